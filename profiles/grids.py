"""What the codes of a block-wise scheme stand for: the integers that a block's scale multiplies.

`even` has all integers of so many bits. `normal` has integers that lie densest where weights do: with the best scale of
each block 16 of them leave 0.82 of the squared error of 16 even ones, on normally distributed weights in blocks of 32;
8 and 4 of them 0.87 of that of as many, in blocks of 64. They were found by Lloyd's algorithm (Lloyd 1982, "Least
squares quantization in PCM") over such blocks, scales and levels in turns; `tests/profiles/test_grids.py` goes on with
it and they stay. They span less than seven bits, so that two products with int8 fit 16 bits, and of such spans these
lose least to whole numbers: at most 0.1 % of the error. The kernels' `grids.h` holds the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

GridName = Literal["even", "normal"]
NORMAL_LEVELS = {  # by bits
    4: (-65, -48, -37, -28, -21, -14, -8, -2, 4, 10, 16, 22, 29, 37, 47, 59),
    3: (-66, -40, -23, -9, 4, 17, 32, 53),
    2: (-69, -24, 11, 52),
}


class _Normal:
    """The `levels` of so many bits; of each half of an integer in `halves` the `number` of the nearest, and that."""

    def __init__(self, levels: tuple[int, ...]) -> None:
        self.levels = np.array(levels, np.float32)
        self.halves = np.arange(2 * levels[0], 2 * levels[-1] + 1)
        self.number = np.abs(self.halves[:, None] / 2 - self.levels).argmin(1).astype(np.uint8)
        self.rounded = self.levels[self.number]


_NORMAL = {bits: _Normal(levels) for bits, levels in NORMAL_LEVELS.items()}


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
        return NORMAL_LEVELS[self.bits][0] if self.name == "normal" else -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        """The highest level."""
        return NORMAL_LEVELS[self.bits][-1] if self.name == "normal" else 2 ** (self.bits - 1) - 1

    @property
    def idle_scale(self) -> float:
        """The scale of a block of zeros: any, or 0 where no level is 0."""
        return 0.0 if self.name == "normal" else 1.0

    def round(self, values: NDArray[np.float32], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """The level nearest to each of `values` (of the normal grid: to the half integer nearest to it), into `out`."""
        if self.name == "even":
            return np.clip(np.rint(values, out=out), self.low, self.high, out=out)
        return np.take(_NORMAL[self.bits].rounded, self._halves(values, out), out=out)

    def nearest_codes(self, values: NDArray[np.float32]) -> NDArray[np.uint8]:
        """The codes of those levels; `values` are overwritten."""
        if self.name == "even":
            return self.codes(self.round(values, values))
        return np.take(_NORMAL[self.bits].number, self._halves(values, values))

    def _halves(self, values: NDArray[np.float32], out: NDArray[np.float32] | None) -> NDArray[np.uint8]:
        """Which of the normal grid's half integers is nearest to each of `values`; computed in `out`."""
        first, last = _NORMAL[self.bits].halves[[0, -1]]
        halves = np.rint(np.multiply(values, np.float32(2), out=out), out=out)
        return (np.clip(halves, first, last, out=out) - first).astype(np.uint8)

    def for_loops(self) -> tuple[np.float32, np.float32, NDArray[np.float32]]:
        """What `compiled_loops.py` takes: its ends, as half integers where the levels of these follow."""
        if self.name == "even":
            return np.float32(self.low), np.float32(self.high), np.empty(0, np.float32)
        normal = _NORMAL[self.bits]
        return np.float32(normal.halves[0]), np.float32(normal.halves[-1]), normal.rounded

    def codes(self, levels: NDArray[np.float32]) -> NDArray[np.uint8]:
        """The codes of levels."""
        if self.name == "even":
            return (levels - self.low).astype(np.uint8)
        normal = _NORMAL[self.bits]
        return normal.number[(2 * levels - normal.halves[0]).astype(np.uint8)]

    def levels(self, codes: NDArray[np.integer]) -> NDArray[np.float32]:
        """What codes stand for."""
        if self.name == "even":
            return codes.astype(np.float32) + np.float32(self.low)
        return _NORMAL[self.bits].levels[codes]
