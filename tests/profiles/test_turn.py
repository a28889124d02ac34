"""Rows for columns, as numpy has them."""

from __future__ import annotations

import numpy as np
import pytest

from arriero.profiles.turn import turned


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 1), (16, 5), (33, 70), (3, 50, 17), (2, 0, 4)])
def test_it_is_the_transposed_array_in_memory_of_its_own(shape: tuple[int, ...], dtype: type[np.generic]) -> None:
    values = np.random.default_rng(0).integers(0, 256, shape).astype(dtype)
    made = turned(values)
    assert np.array_equal(made, values.swapaxes(-1, -2))
    assert made.dtype == dtype
    assert made.flags.c_contiguous
    assert not np.shares_memory(made, values)


def test_it_is_laid_where_it_is_wanted_from_any_view() -> None:
    values = np.random.default_rng(0).standard_normal((40, 90)).astype(np.float32)
    stack = np.zeros((2, 45, 100), np.float32)
    given = turned(values[:, ::2], stack[1, :, 7:47])
    assert given.base is not None
    assert np.array_equal(stack[1, :, 7:47], values[:, ::2].T)
    assert not stack[0].any()
    assert not stack[1, :, :7].any()
    assert not stack[1, :, 47:].any()
