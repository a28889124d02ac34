"""Pictures of every kind as red, green and blue bytes: converted as a viewer shows them, or refused.

What is transparent is seen on white, as in Hugging Face's processor (Meta's own preprocessing sees RGBA so, and drops
the transparency of other kinds). Grey of 12 and 16 bits is scaled to bytes, where both of them cut off what is brighter
than 255. Colour profiles are not applied, as in both of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from arriero.errors import ArrieroError
from arriero.runtimes.processor.high_range import check_range, transfer_of
from arriero.runtimes.processor.levels import load_levels
from arriero.runtimes.processor.picture_file import EXPECTED, FORMATS, open_picture

ImageLike = Image.Image | NDArray[np.uint8] | str | os.PathLike[str] | bytes
Images = ImageLike | Sequence[ImageLike] | None

MOST_PIXELS = 1 << 26  # of one picture; decoded it takes a few times as many bytes, however small its file is
PLAIN = ("RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV", "RGBX")
TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")


def as_list(images: Images) -> list[ImageLike]:
    """Take one image, several, or none."""
    if isinstance(images, str | bytes | os.PathLike | Image.Image | np.ndarray):
        return [images]
    return list(images) if isinstance(images, Iterable) else [] if images is None else [images]


def read_image(image: ImageLike) -> Image.Image:
    """Give `image` as RGB: a Pillow image, a path, encoded bytes, or an array uint8 [h, w, 3].

    Raises ArrieroError for what cannot be decoded, has no one meaning in bytes, or has more than MOST_PIXELS.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ArrieroError(
                f"an image array is {image.dtype} {list(image.shape)}",
                expected="uint8 [height, width, 3], red first",
            )
        check_pixels(image.shape[1], image.shape[0], "the image array")
        return Image.fromarray(np.ascontiguousarray(image))
    if isinstance(image, Image.Image):
        return _converted(image, "the image")
    name = "the image bytes" if isinstance(image, bytes) else str(image)
    try:
        with open_picture(image) as opened:
            return _converted(opened, name)
    except FileNotFoundError:
        raise ArrieroError("there is no such image file", where=name, remedy="Check the path") from None
    except (OSError, TypeError, ValueError, AttributeError, Image.DecompressionBombError) as error:
        raise ArrieroError(
            f"this is not a readable image ({error})",
            where=name,
            expected=EXPECTED,
            remedy="Check that the file is complete and is an image",
        ) from None


def check_pixels(width: int, height: int, name: str) -> None:
    """Refuse a picture for its size, before it is decoded."""
    if min(width, height) < 1:
        raise ArrieroError(f"the image is {width} by {height} pixels", where=name, expected="at least one pixel")
    if width * height > MOST_PIXELS:
        raise ArrieroError(
            f"the image is {width:,} by {height:,} pixels",
            where=name,
            expected=f"at most {MOST_PIXELS:,} pixels in all",
            remedy="Make it smaller: the model sees far fewer",
        )


def on_white(image: Image.Image) -> Image.Image:
    """An RGBA picture as it is seen on white."""
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _check_still(image: Image.Image, name: str) -> None:
    """Refuse moving pictures and pages, of which one image would show a part; a camera's MPO begins with the photo."""
    try:
        frames = getattr(image, "n_frames", 1)
    except ValueError:
        if getattr(image, "fp", None) is not None:
            raise
        frames = 1  # its file is closed: what is left is the frame that was loaded
    if frames > 1 and image.format != "MPO":
        raise ArrieroError(
            f"the image holds {frames} frames or pages",
            where=name,
            expected="one picture",
            remedy='Show it as a video ({"type": "video", "path": ...}, or --video), or save the one that is meant '
            "(`image.copy()` is the one that a Pillow image stands at)",
        )


def _converted(image: Image.Image, name: str) -> Image.Image:
    check_pixels(image.width, image.height, name)
    if getattr(image, "tile", ()) and image.format not in (*FORMATS, "MPO"):  # MPO is JPEG with more behind it
        remedy = "Load it before, or convert it to one of these"
        raise ArrieroError(f"the file is {image.format}", where=name, expected=EXPECTED, remedy=remedy)
    try:
        _check_still(image, name)
        remedy = "Tone-map it first, as photo editors do when they save a copy in sRGB"
        check_range(transfer_of(image), "image", name, remedy)
        image = load_levels(image, name)
    except ArrieroError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever the parser in them does
        raise ArrieroError(
            f"the image is truncated or corrupt ({error})", where=name, remedy="Get a complete copy of the file"
        ) from None
    if image.mode in TRANSPARENT or (image.mode in PLAIN and "transparency" in image.info):
        return on_white(_with_alpha(image))
    if image.mode in PLAIN:
        return image.convert("RGB")
    raise ArrieroError(
        f"the image has pixels of the kind {image.mode}, whose white is unknown",
        where=name,
        expected="8-bit or 16-bit grey, or colours",
        remedy="Convert it to 8-bit RGB",
    )


def _with_alpha(image: Image.Image) -> Image.Image:
    step = {"PA": "RGBA", "RGBa": "RGBA", "La": "LA"}.get(image.mode)
    return (image.convert(step) if step else image).convert("RGBA")
