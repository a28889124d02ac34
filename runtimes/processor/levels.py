"""A picture's levels in eight bits, from files that have them in other numbers of bits.

Pillow gives grey of 12 and 16 bits as it stands, cuts other colours of 16 bits off at their upper byte, and gives the
transparent level of a PNG in the file's own bits. Here levels are scaled and rounded, and what is transparent is found
before. Cut off by Pillow remain 16-bit colours of JPEG 2000, of a TIFF with premultiplied alpha or compressed planes,
and of an image that was loaded before: a level is one too low at most. What is transparent in the last, Pillow says.

Shapes: h height, w width, c channels.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile

from arriero.errors import ArrieroError
from arriero.runtimes.processor.picture_file import FORMATS

DEEP_GREY = ("I;16", "I;16L", "I;16B", "I;16N")
LOW_GREY = {"L;2": 85, "L;4": 17}  # raw modes of a PNG, and what Pillow multiplies their levels with
UPPER_BYTES = ("RGB", "RGBX", "RGBA", "CMYK")  # raw modes that, with ;16 and an order of bytes, take the upper ones
BITS, COMPRESSION, COLOURS, BIT_ORDER, PLANES = 258, 259, 262, 266, 284  # tags of a TIFF
WHITE_IS_ZERO = 0  # of COLOURS


def load_levels(image: Image.Image, name: str) -> Image.Image:
    """Load a picture, turn it as its EXIF data says, and give it in levels of eight bits where that is known.

    Raises ArrieroError for levels that Pillow would misread, and whatever else its decoders do.
    """
    raw = _raw_mode(image)
    clear = _clear(image, raw, name)
    white, inverted = _grey_scale(image, raw, name)
    lower = _lower_bytes(image, raw)
    image.load()
    turned = ImageOps.exif_transpose(image)
    if lower is not None:
        return _rounded(np.asarray(turned), np.asarray(ImageOps.exif_transpose(lower)), raw, clear)
    if turned.mode in DEEP_GREY:
        return _scaled_grey(np.asarray(turned), white, inverted, clear)
    if clear is not None:
        turned.info["transparency"] = clear
    return turned


def _raw_mode(image: Image.Image) -> str:
    """Pillow's name of how the pixels lie in the file, "" for an image that is loaded."""
    tiles = getattr(image, "tile", ())
    arguments = tiles[0][3] if tiles else ""
    raw = arguments if isinstance(arguments, str) or not arguments else arguments[0]
    return raw if isinstance(raw, str) else ""


def _clear(image: Image.Image, raw: str, name: str) -> Any:
    """The transparent level or colour in the levels that Pillow loads, or those of a 16-bit colour; else what it is."""
    clear = image.info.get("transparency")
    levels = clear if isinstance(clear, tuple) else (clear,)
    if image.mode not in ("L", "RGB") or not all(isinstance(level, int) for level in levels):
        return clear
    if _is_deep(raw):
        return clear
    if not raw and max(levels) > 255:
        raise ArrieroError(
            f"the transparent colour of the image, {clear}, has more bits than its pixels, which were loaded before",
            where=name,
            remedy="Give the path or the bytes of the file",
        )
    whole = tuple((level & (255 // LOW_GREY.get(raw, 1))) * LOW_GREY.get(raw, 1) for level in levels)
    return whole if isinstance(clear, tuple) else whole[0]


def _grey_scale(image: Image.Image, raw: str, name: str) -> tuple[int, bool]:
    """The level of white, or of black where the second is True, if the picture is deep grey."""
    if not isinstance(image, TiffImageFile):
        return 65535, False
    tags = image.tag_v2
    bits, white_is_zero = max(tags.get(BITS, (1,))), tags.get(COLOURS, WHITE_IS_ZERO) == WHITE_IS_ZERO
    apart = tags.get(PLANES, 1) == 2 and tags.get(COMPRESSION, 1) == 1
    if apart and (bits != 8 or white_is_zero or tags.get(BIT_ORDER, 1) == 2):
        raise ArrieroError(
            "the image is a TIFF with each colour in a plane of its own, which Pillow misreads",
            where=name,
            expected="planes of 8 bits that are compressed, or colours side by side",
            remedy="Save it as PNG",
        )
    # A Pillow that turned such levels round itself would call their raw mode something else.
    return (1 << bits) - 1, white_is_zero and (not raw or raw in DEEP_GREY)


def _is_deep(raw: str) -> bool:
    kind, _, order = raw.partition(";16")
    return raw == "LA;16B" or (kind in UPPER_BYTES and order in ("L", "B", "N"))


def _lower_bytes(image: Image.Image, raw: str) -> Image.Image | None:
    """The image's lower bytes, where Pillow loads the upper ones of a deep colour; both of them for grey with alpha.

    They are the upper ones to whoever takes the bytes in the wrong order.
    """
    if not _is_deep(raw):
        return None
    orders = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
    other = "RGBA" if raw == "LA;16B" else raw[:-1] + orders[raw[-1]]
    twin: Any = Image.open(image.fp, formats=tuple(FORMATS))  # type: ignore[attr-defined]  # that of a file, not loaded
    twin.tile = [
        tile._replace(args=other if isinstance(tile.args, str) else (other, *tile.args[1:])) for tile in twin.tile
    ]
    twin.load()
    loaded: Image.Image = twin
    return loaded


def _rounded(upper: NDArray[np.uint8], lower: NDArray[np.uint8], raw: str, clear: Any) -> Image.Image:
    """Levels [h, w, c] of 16 bits, given by their bytes, in eight; a transparent colour becomes alpha."""
    if raw == "LA;16B":
        upper, lower = lower[..., 0::2], lower[..., 1::2]
    # A level is 257 * upper + (lower - upper), and a level of eight bits 257 of those.
    beyond = lower.astype(np.int16) - upper
    levels = upper + (beyond > 128).astype(np.uint8) - (beyond < -128).astype(np.uint8)
    if clear is not None and raw.startswith("RGB;"):
        same = (upper == np.array(clear) // 256) & (lower == np.array(clear) % 256)
        alpha = np.where(same.all(-1, keepdims=True), 0, 255).astype(np.uint8)
        levels = np.concatenate([levels, alpha], -1)
    mode = "CMYK" if raw.startswith("CMYK") else {2: "LA", 3: "RGB", 4: "RGBA"}[levels.shape[2]]
    return Image.merge(mode, [Image.fromarray(plane) for plane in np.moveaxis(levels, -1, 0)])


def _scaled_grey(levels: NDArray[np.uint16], white: int, inverted: bool, clear: Any) -> Image.Image:
    """Grey [h, w] of `white` + 1 levels in 256; a transparent level becomes alpha."""
    scaled = ((levels.astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)
    grey = Image.fromarray(255 - scaled if inverted else scaled)
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(levels == clear, 0, 255).astype(np.uint8)))
    return grey
