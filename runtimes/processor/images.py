"""Images of any size to Llama 4's tiles: the grey levels of Meta's own preprocessing, normalised as Hugging Face does.

Meta's resizes with Pillow, as this does. Hugging Face's resizes with torch, whose weights have 16 bits where Pillow's
have 22: there a level may be one more or one less.

An image is fitted on a canvas of whole tiles (at most `max_patches`), padded right and below, cut into tiles, and
followed by a global tile (the whole image squeezed into one) when the canvas has more than one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from arriero.errors import ArrieroError, Problems
from arriero.runtimes.backend import Floats

Size = tuple[int, int]  # height, width
ORIGINAL = "Take the file from the original checkpoint"
MOST_TILES = 1024  # of an image; Llama 4 takes 16


@dataclass(frozen=True)
class Tiles:
    """One image as tiles f32 [rows * columns (+ 1 global when more than one), 3, h, w]."""

    pixel_values: Floats
    rows: int
    columns: int


@dataclass(frozen=True)
class Tiler:
    """The image settings of a checkpoint's preprocessor_config.json, applied."""

    size: int = 336
    max_patches: int = 16
    resize_to_max_canvas: bool = False
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255

    @classmethod
    def parse(cls, settings: Any, where: str) -> Tiler:
        """Read preprocessor settings. Raises `Problems` with every value that this runtime cannot honour."""
        if not isinstance(settings, Mapping):
            what = f"the image settings are a {type(settings).__name__}"
            raise ArrieroError(what, where=where, expected="an object", remedy=ORIGINAL)
        problems: list[ArrieroError] = []

        def read(key: str, default: Any, expected: str, fits: Callable[[Any], bool]) -> Any:
            value = settings.get(key, default)
            if fits(value):
                return value
            problems.append(ArrieroError(f"is {value!r}", where=f"{where}:{key}", expected=expected, remedy=ORIGINAL))
            return default

        def triple(key: str, default: tuple[float, ...], least: float | None = None) -> tuple[float, ...]:
            value = read(
                key, default, f"3 numbers{'' if least is None else ' above 0'}", lambda v: _is_triple(v, least)
            )
            return tuple(map(float, value))

        for key in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
            read(key, True, "true", lambda value: value is True)
        read("resample", 2, "2 (bilinear)", lambda value: type(value) is int and value == 2)
        kinds = ("Llama4ImageProcessor", "Llama4ImageProcessorFast")
        read("image_processor_type", kinds[0], " or ".join(kinds), lambda value: value in kinds)
        size = read("size", {"height": cls.size, "width": cls.size}, "a square's height and width", _is_square)
        tiler = cls(
            size=size["height"],
            max_patches=read("max_patches", cls.max_patches, f"1 to {MOST_TILES}", _is_tile_count),
            resize_to_max_canvas=read("resize_to_max_canvas", False, "true or false", lambda v: isinstance(v, bool)),
            image_mean=triple("image_mean", cls.image_mean),
            image_std=triple("image_std", cls.image_std, 0),
            rescale_factor=read("rescale_factor", cls.rescale_factor, "a number above 0", lambda v: _is_number(v, 0)),
        )
        if problems:
            raise Problems("image settings that cannot be honoured", problems)
        return tiler

    def tile(self, image: Image.Image) -> Tiles:
        """Cut an RGB `image` into tiles."""
        height, width = image.height, image.width
        rows, columns = self._grid(height, width)
        canvas = rows * self.size, columns * self.size
        room = canvas
        if not self.resize_to_max_canvas:
            # small images are enlarged to one tile's size at most, whatever the canvas
            room = (
                min(max(height, self.size), canvas[0]),
                min(max(width, self.size), canvas[1]),
            )
        fitted = _resize(image, _fit(height, width, room))
        padded = np.zeros((*canvas, 3), np.uint8)
        padded[: fitted.shape[0], : fitted.shape[1]] = fitted
        tiles = padded.reshape(rows, self.size, columns, self.size, 3).transpose(0, 2, 4, 1, 3)
        tiles = tiles.reshape(rows * columns, 3, self.size, self.size)
        if rows * columns > 1:
            whole = _resize(image, (self.size, self.size)).transpose(2, 0, 1)
            tiles = np.concatenate([tiles, whole[None]])
        channels = np.arange(3)[:, None, None]
        return Tiles(self._levels[channels, tiles], rows, columns)

    @cached_property
    def _levels(self) -> Floats:
        """What each channel's 256 byte values become [3, 256]: rescaled and normalised in bfloat16, as in training."""
        scale = np.float32(self.rescale_factor)
        values = _bfloat16(np.arange(256, dtype=np.float32) * scale)
        mean, std = (_bfloat16(np.asarray(x, np.float32))[:, None] for x in (self.image_mean, self.image_std))
        return _bfloat16(_bfloat16(values[None] - mean) / std)

    def _grid(self, height: int, width: int) -> Size:
        """Choose the canvas, in tiles: enlarge as little as possible, else shrink as little as possible.

        Among canvases of the same scale the smallest wins, and then the one met first in the processor's order
        (aspect ratios as met while the tile count falls from `max_patches`, rows ascending).
        """
        by_ratio: dict[Fraction, list[Size]] = {}
        for count in range(self.max_patches, 0, -1):
            for rows in (r for r in range(1, count + 1) if count % r == 0):
                by_ratio.setdefault(Fraction(rows, count // rows), []).append((rows, count // rows))
        grids = [grid for same_ratio in by_ratio.values() for grid in same_ratio]
        # float32, since the processor compares scales in that precision and ties there must be ties here
        scales = [
            min(
                np.float32(rows * self.size) / np.float32(height),
                np.float32(columns * self.size) / np.float32(width),
            )
            for rows, columns in grids
        ]
        enlarging = [scale for scale in scales if scale >= 1]
        chosen = min(enlarging) if enlarging and not self.resize_to_max_canvas else max(scales)
        return min((g for g, s in zip(grids, scales, strict=True) if s == chosen), key=lambda g: g[0] * g[1])


def _is_number(value: Any, above: float | None = None) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return number and (above is None or value > above)


def _is_triple(value: Any, above: float | None) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(_is_number(each, above) for each in value)


def _is_square(value: Any) -> bool:
    sides = (value.get("height"), value.get("width")) if isinstance(value, Mapping) else (None, None)
    return type(sides[0]) is int and sides[0] > 0 and sides[0] == sides[1]


def _is_tile_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MOST_TILES


def _fit(height: int, width: int, room: Size) -> Size:
    """Give the largest size of the same aspect ratio inside `room`; the free side is rounded down, 1 at least."""
    scale_h, scale_w = room[0] / height, room[1] / width
    if scale_w < scale_h:
        return max(min(int(height * scale_w), room[0]), 1), max(room[1], 1)
    return max(room[0], 1), max(min(int(width * scale_h), room[1]), 1)


def _resize(image: Image.Image, size: Size) -> NDArray[np.uint8]:
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def _bfloat16(values: Floats) -> Floats:
    """Round f32 to the nearest bfloat16, ties to even, kept as f32."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> np.uint32(16)) & 1)
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)
