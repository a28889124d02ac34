"""Files that hold a picture: which kinds are taken, and one opened by the decoders of these and no others.

Pillow knows more kinds, and for some of them starts another program: Ghostscript for EPS.
"""

from __future__ import annotations

import io
import os
import warnings
from types import MappingProxyType

from PIL import Image

# Pillow's names of the kinds, with the endings of their files. TGA is the last to be tried: it has no signature.
FORMATS = MappingProxyType(
    {
        "PNG": (".apng", ".png"),
        "JPEG": (".jfif", ".jpe", ".jpeg", ".jpg", ".mpo"),
        "WEBP": (".webp",),
        "GIF": (".gif",),
        "BMP": (".bmp",),
        "TIFF": (".tif", ".tiff"),
        "AVIF": (".avif",),
        "JPEG2000": (".j2c", ".j2k", ".jp2", ".jpc", ".jpf", ".jpx"),
        "ICO": (".ico",),
        "PPM": (".pbm", ".pgm", ".pnm", ".ppm"),
        "TGA": (".tga",),
    }
)
SUFFIXES = tuple(sorted(suffix for suffixes in FORMATS.values() for suffix in suffixes))
EXPECTED = f"a picture in one of {', '.join(FORMATS)}"


def open_picture(source: str | os.PathLike[str] | bytes) -> Image.Image:
    """The picture in a file or in encoded bytes, not decoded yet. Raises what Pillow does where there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own checks of pixels are stricter
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=tuple(FORMATS))
