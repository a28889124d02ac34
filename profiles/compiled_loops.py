"""The loops of calibrated rounding that array operations are slow at, compiled by Numba when this file is imported.

They compute what operations of numpy would, in that order and each of them rounded by itself: nothing is contracted or
reassociated, so that results have the same bits on every processor. They run without Python's lock. What they compile
to is kept beside this file, as Python's own bytecode is.
Legend: M = n J blocks, n rows, C columns of a strip, J blocks of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import float32, int64, njit, void
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Loop = TypeVar("Loop", bound=Callable[..., None])
AT_ONCE = 256  # blocks, or rows, whose numbers stay in the cache nearest to a processor
LINES = 16  # rows whose columns are gathered at a time: what a line of a processor's cache holds
ROUNDER = np.float32(3 << 22)  # added and taken away again, it leaves the nearest integer, of two the even one
LINE, MATRIX, ANY_MATRIX = float32[::1], float32[:, ::1], float32[:, :]
GRID = (float32, float32, LINE)  # what a grid's levels are, as `Grid.for_loops` gives them


def compiled(*signature: Any) -> Callable[[Loop], Loop]:
    """Compile a loop that takes these."""
    takes = void(*signature)

    def compile_loop(loop: Loop) -> Loop:
        try:  # "numpy": a division by zero is infinite
            made: Any = njit(takes, nogil=True, error_model="numpy", cache=True)(loop)
        except (RuntimeError, OSError):  # nowhere to keep it, or no room there
            made = njit(takes, nogil=True, error_model="numpy")(loop)
        return cast(Loop, made)

    return compile_loop


# What is no number becomes the lowest level, so that no index leaves its table: max(low, x) is low then.
# What stands in a function of its own is seen to touch nothing else, and becomes vector arithmetic.
@compiled(LINE, LINE, LINE, LINE, LINE, *GRID)
def _add_errors(
    values: Floats, step: Floats, weight: Floats, plus: Floats, minus: Floats, low: Any, high: Any, levels: Floats
) -> None:
    """Add to `plus` and `minus` what an element of each block weighs when it is rounded at `step`, and at -`step`."""
    if len(levels):
        for m in range(len(values)):
            half = values[m] / step[m] * np.float32(2)
            off = values[m] - levels[np.int32(min(high, max(low, half)) + ROUNDER - ROUNDER - low)] * step[m]
            plus[m] += off * off * weight[m]
            off = values[m] + levels[np.int32(min(high, max(low, -half)) + ROUNDER - ROUNDER - low)] * step[m]
            minus[m] += off * off * weight[m]
    else:
        for m in range(len(values)):
            ratio = values[m] / step[m]
            off = values[m] - (min(high, max(low, ratio)) + ROUNDER - ROUNDER) * step[m]
            plus[m] += off * off * weight[m]
            off = values[m] - (min(-low, max(-high, ratio)) + ROUNDER - ROUNDER) * step[m]
            minus[m] += off * off * weight[m]


@compiled(MATRIX, MATRIX, MATRIX, *GRID, LINE)
def search_steps(
    blocks: Floats, weights: Floats, steps: Floats, low: Any, high: Any, levels: Floats, found: Floats
) -> None:
    """Give `found` [M] the step of least error for `blocks` [block, M], whose elements weigh `weights` [block, J].

    `steps` [clips, M] are tried with both signs, in order; of equal ones the first is taken. Levels are the integers
    from `low` to `high`; of a grid that is not even, `levels` of the half integers from `low` / 2 to `high` / 2. A
    block of which no error is finite keeps what it had.
    """
    group = weights.shape[1]
    plus, minus, best = np.empty(AT_ONCE, np.float32), np.empty(AT_ONCE, np.float32), np.empty(AT_ONCE, np.float32)
    for start in range(0, blocks.shape[1], group):
        for first in range(0, group, AT_ONCE):
            width = min(AT_ONCE, group - first)
            here, of_group = slice(start + first, start + first + width), slice(first, first + width)
            best[:width] = np.inf
            for clip in range(len(steps)):
                step, chosen = steps[clip, here], found[here]
                plus[:width] = 0
                minus[:width] = 0
                for element in range(len(blocks)):
                    values, weight = blocks[element, here], weights[element, of_group]
                    _add_errors(values, step, weight, plus[:width], minus[:width], low, high, levels)
                for m in range(width):
                    if plus[m] < best[m]:
                        best[m], chosen[m] = plus[m], step[m]
                    if minus[m] < best[m]:
                        best[m], chosen[m] = minus[m], -step[m]


@compiled(LINE, LINE, float32, *GRID, LINE, LINE, LINE)
def _round_column(
    values: Floats,
    step: Floats,
    own: Any,
    low: Any,
    high: Any,
    levels: Floats,
    level: Floats,
    rounded: Floats,
    error: Floats,
) -> None:
    for n in range(len(values)):
        ratio = values[n] / (step[n] if step[n] != 0 else np.float32(1))
        if len(levels):
            half = min(high, max(low, ratio * np.float32(2))) + ROUNDER - ROUNDER
            level[n] = levels[np.int32(half - low)]
        else:
            level[n] = min(high, max(low, ratio)) + ROUNDER - ROUNDER
        rounded[n] = level[n] * step[n]
        error[n] = (values[n] - rounded[n]) / own


@compiled(LINE, LINE, float32)
def _pass_on(error: Floats, changed: Floats, share: Any) -> None:
    for n in range(len(error)):
        changed[n] -= share * error[n]


@compiled(MATRIX, MATRIX, int64[::1], ANY_MATRIX, *GRID, MATRIX, MATRIX, MATRIX)
def round_strip(
    rest: Floats,
    steps: Floats,
    of: NDArray[np.int64],
    upper: Floats,
    low: Any,
    high: Any,
    levels: Floats,
    level: Floats,
    rounded: Floats,
    errors: Floats,
) -> None:
    """Round the columns `rest` [C, n], each after the errors of those before it were passed on by `upper` [C, C].

    `steps` [J, n] are those of all blocks, of which the columns lie in `of` [C]; levels as in `search_steps`. Gives
    `level` and `rounded` [C, n], which is that times the step, and `errors` [C, n], what other columns are to get.
    """
    for first in range(0, rest.shape[1], AT_ONCE):
        rows = slice(first, min(first + AT_ONCE, rest.shape[1]))
        for column in range(len(rest)):
            values, step, own = rest[column, rows], steps[of[column], rows], upper[column, column]
            error = errors[column, rows]
            _round_column(values, step, own, low, high, levels, level[column, rows], rounded[column, rows], error)
            for other in range(column + 1, len(rest)):
                _pass_on(error, rest[other, rows], upper[column, other])


@compiled(ANY_MATRIX, int64[::1], MATRIX)
def take_columns(matrix: Floats, columns: NDArray[np.int64], taken: Floats) -> None:
    """Give `taken` [C, n] the `columns` [C] of `matrix` [n, K], each in a line."""
    for first in range(0, len(matrix), LINES):
        last = min(first + LINES, len(matrix))
        for column in range(len(columns)):
            for n in range(first, last):
                taken[column, n] = matrix[n, columns[column]]


@compiled(MATRIX, int64[::1], ANY_MATRIX)
def put_columns(taken: Floats, columns: NDArray[np.int64], matrix: Floats) -> None:
    """Write `taken` [C, n] over the `columns` [C] of `matrix` [n, K]."""
    for first in range(0, len(matrix), LINES):
        last = min(first + LINES, len(matrix))
        for column in range(len(columns)):
            for n in range(first, last):
                matrix[n, columns[column]] = taken[column, n]
