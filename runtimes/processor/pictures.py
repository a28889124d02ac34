"""Pictures of every kind as red, green and blue bytes: converted as a viewer shows them, or refused.

What is transparent is seen on white, as in Hugging Face's processor (Meta's own preprocessing sees RGBA so, and drops
the transparency of other kinds). 16-bit grey is scaled to bytes, where both of them cut off what is brighter than 255.
Colour profiles are not applied, as in both of them.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from arriero.errors import ArrieroError

ImageLike = Image.Image | NDArray[np.uint8] | str | os.PathLike[str] | bytes
Images = ImageLike | Sequence[ImageLike] | None

MOST_PIXELS = 1 << 26  # of one picture; decoded it takes a few times as many bytes, however small its file is
PLAIN = ("RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV", "RGBX")
DEEP_GREY = ("I;16", "I;16L", "I;16B", "I;16N")
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the check of pixels is stricter
            opened = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
        with opened:
            _check_still(opened, name)
            return _converted(opened, name)
    except FileNotFoundError:
        raise ArrieroError("there is no such image file", where=name, remedy="Check the path") from None
    except (OSError, TypeError, ValueError, AttributeError, Image.DecompressionBombError) as error:
        raise ArrieroError(
            f"this is not a readable image ({error})",
            where=name,
            expected="a picture that Pillow reads, such as PNG or JPEG",
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
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise ArrieroError(
            f"the image holds {frames} frames or pages",
            where=name,
            expected="one picture",
            remedy='Show it as a video ({"type": "video", "path": ...}, or --video), or save the one that is meant',
        )


def _converted(image: Image.Image, name: str) -> Image.Image:
    check_pixels(image.width, image.height, name)
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's decoders raise whatever the parser in them does
        raise ArrieroError(
            f"the image is truncated or corrupt ({error})", where=name, remedy="Get a complete copy of the file"
        ) from None
    if image.mode in DEEP_GREY:
        return Image.fromarray(_bytes_of(image)).convert("RGB")
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


def _bytes_of(image: Image.Image) -> NDArray[np.uint8]:
    """16-bit grey [h, w] scaled to bytes, a transparent level of a PNG on white."""
    levels = np.asarray(image).astype(np.uint32)
    scaled = ((levels * 255 + 32767) // 65535).astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        scaled[levels == clear] = 255
    return scaled
