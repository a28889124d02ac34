"""Compiled loops against the operations of numpy that they stand for, bit by bit."""

from __future__ import annotations

import numba
import numba.core.caching
import numpy as np
import pytest

from arriero.profiles.compiled_loops import (
    AT_ONCE,
    LINE,
    compiled,
    put_columns,
    round_strip,
    search_steps,
    take_columns,
)
from arriero.profiles.grids import Grid

GRIDS = [Grid(bits, name) for name in ("even", "normal") for bits in (2, 3, 4)] + [Grid(8)]


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("group", [1, 3, AT_ONCE, AT_ONCE + 5])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_step_of_least_error_is_found(grid: Grid, group: int) -> None:
    blocks, weights = draw(16, 2 * group), np.abs(draw(16, group, seed=1))
    shares = np.linspace(0.6, 1.05, 5, dtype=np.float32)[:, None] / np.float32(grid.reach)
    steps = (shares * np.abs(blocks).max(0)).astype(np.float32)
    steps[:, 0] = np.inf
    best, expected = np.full(2 * group, np.inf, np.float32), np.full(2 * group, 7, np.float32)
    for tried in steps:
        for step in (tried, -tried):
            off = np.square(blocks - grid.round(blocks / step) * step) * np.tile(weights, 2)
            error = np.zeros_like(best)
            for element in off:
                error += element
            better = error < best
            best[better], expected[better] = error[better], step[better]
    found = np.full(2 * group, 7, np.float32)
    search_steps(blocks, weights, steps, *grid.for_loops(), found)
    np.testing.assert_array_equal(found, expected)
    assert found[0] == 7  # of which no error is a number
    if group > 1 and grid.bits < 8:
        assert (found[1:] < 0).any()
        assert (found[1:] > 0).any()


@pytest.mark.parametrize("rows", [1, AT_ONCE, 2 * AT_ONCE + 3])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_strip_is_rounded_column_by_column(grid: Grid, rows: int) -> None:
    values, steps, of = draw(7, rows), draw(3, rows, seed=1), np.array([0, 2, 2, 1, 0, 1, 2])
    steps[1, 0] = 0  # a block of zeros in a grid without zero
    upper = np.triu(draw(9, 9, seed=2))[1:8, 1:8]
    rest, expected = values.copy(), np.empty((3, 7, rows), np.float32)
    for column in range(7):
        step = steps[of[column]]
        level = grid.round(rest[column] / np.where(step == 0, np.float32(1), step))
        error = (rest[column] - level * step) / upper[column, column]
        rest[column + 1 :] -= upper[column, column + 1 :, None] * error
        expected[:, column] = level, level * step, error
    made = np.empty_like(expected)
    round_strip(values, steps, of, upper, *grid.for_loops(), *made)
    np.testing.assert_array_equal(made, expected)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_what_is_no_number_is_the_lowest_level_and_no_error(grid: Grid) -> None:
    made = np.zeros((3, 1, 3), np.float32)
    values = np.array([[np.nan, np.inf, -np.inf]], np.float32)
    round_strip(
        values, np.ones((1, 3), np.float32), np.zeros(1, int), np.eye(1, dtype=np.float32), *grid.for_loops(), *made
    )
    np.testing.assert_array_equal(made[0], [[grid.low, grid.high, grid.low]])
    assert not np.isfinite(made[2]).any()


@pytest.mark.parametrize("rows", [1, 16, 37])
def test_columns_are_taken_and_put_back(rows: int) -> None:
    matrix, order = draw(rows, 50), np.random.default_rng(1).permutation(50)
    taken, back = np.empty((50, rows), np.float32), np.full_like(matrix, np.nan)
    take_columns(matrix, order, taken)
    np.testing.assert_array_equal(taken, matrix.T[order])
    put_columns(taken[:20], order[:20], back)
    np.testing.assert_array_equal(back[:, order[:20]], matrix[:, order[:20]])
    assert np.isnan(back[:, order[20:]]).all()


def test_a_loop_is_compiled_where_there_is_nowhere_to_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.core.caching.CacheImpl, "_locator_classes", [])

    def double(values: np.ndarray) -> None:
        for n in range(len(values)):
            values[n] *= 2

    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(cache=True)(double)
    double = compiled(LINE)(double)
    values = draw(5)
    expected = 2 * values
    double(values)
    np.testing.assert_array_equal(values, expected)
