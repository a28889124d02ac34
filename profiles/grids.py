"""What the codes of a block-wise scheme stand for: the integers that a block's scale multiplies.

`even` has all integers of so many bits. `normal` has 16 integers that lie densest where weights do: with the best scale
of each block they leave 0.82 of the squared error of 16 even ones, on normally distributed weights in blocks of 32.
They were found by Lloyd's algorithm (Lloyd 1982, "Least squares quantization in PCM") over such blocks, scales and
levels in turns; `tests/profiles/test_grids.py` goes on with it and they stay. They span less than seven bits, so that
two products with int8 fit 16 bits, and of such spans this one loses least to whole numbers: 0.1 % of the error. The
kernels' `grid4.h` holds the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

GridName = Literal["even", "normal"]
NORMAL_LEVELS = (-65, -48, -37, -28, -21, -14, -8, -2, 4, 10, 16, 22, 29, 37, 47, 59)
_LEVELS = np.array(NORMAL_LEVELS, np.float32)
# of each half of an integer from the lowest level on the number of the nearest level, and that level
_HALVES = np.arange(2 * NORMAL_LEVELS[0], 2 * NORMAL_LEVELS[-1] + 1)
_NEAREST = np.abs(_HALVES[:, None] / 2 - _LEVELS).argmin(1).astype(np.uint8)
_ROUNDED = _LEVELS[_NEAREST]


@dataclass(frozen=True)
class Grid:
    """The levels of `bits` bits of the grid `name`."""

    bits: int
    name: GridName = "even"

    @property
    def reach(self) -> int:
        """The largest magnitude of a level: one below zero, of which there is no counterpart above."""
        return -self.low

    @property
    def low(self) -> int:
        """The lowest level."""
        return NORMAL_LEVELS[0] if self.name == "normal" else -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        """The highest level."""
        return NORMAL_LEVELS[-1] if self.name == "normal" else 2 ** (self.bits - 1) - 1

    @property
    def idle_scale(self) -> float:
        """The scale of a block of zeros: any, or 0 where no level is 0."""
        return 0.0 if self.name == "normal" else 1.0

    def round(self, values: NDArray[np.float32], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """The level nearest to each of `values` (of the normal grid: to the half integer nearest to it), into `out`."""
        if self.name == "even":
            return np.clip(np.rint(values, out=out), self.low, self.high, out=out)
        halves = np.rint(np.multiply(values, np.float32(2), out=out), out=out)
        numbers = (np.clip(halves, _HALVES[0], _HALVES[-1], out=out) - _HALVES[0]).astype(np.uint8)
        return np.take(_ROUNDED, numbers, out=out)

    def codes(self, levels: NDArray[np.float32]) -> NDArray[np.uint8]:
        """The codes of levels."""
        if self.name == "even":
            return (levels - self.low).astype(np.uint8)
        return _NEAREST[(2 * levels - _HALVES[0]).astype(np.uint8)]

    def levels(self, codes: NDArray[np.integer]) -> NDArray[np.float32]:
        """What codes stand for."""
        if self.name == "even":
            return codes.astype(np.float32) + np.float32(self.low)
        return _LEVELS[codes]
