"""Pieces run on as many threads as linear algebra has, which itself has one meanwhile."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from arriero.profiles.gptq import ROWS, gptq
from arriero.profiles.grids import Grid
from arriero.profiles.input_factor import InputFactor
from arriero.profiles.moments import FEW, Moments
from arriero.profiles.piecewise import piecewise
from arriero.profiles.triangular import SMALL


def threads_of_numpy() -> set[int]:
    """How many threads the libraries behind numpy have."""
    loaded = [one for one in threadpool_info() if one["user_api"] == "blas" and "numpy" in one["filepath"]]
    return {one["num_threads"] for one in loaded}


def test_pieces_come_in_their_order_from_as_many_threads_and_numpy_has_one_meanwhile() -> None:
    with threadpool_limits(2, "blas"):
        together = threading.Barrier(2, timeout=60)  # two at once, or neither goes on

        def work(piece: slice) -> tuple[int, int]:
            together.wait()
            return piece.start, piece.stop

        with piecewise() as each:
            assert each(work, 10, 3) == [(0, 3), (3, 6), (6, 9), (9, 10)]
            assert threads_of_numpy() == {1}
        assert threads_of_numpy() == {2}


def test_what_a_piece_raises_is_raised_and_numpy_has_its_threads_again() -> None:
    def work(piece: slice) -> None:
        if piece.start:
            raise ValueError("the second one")

    with threadpool_limits(2, "blas"):
        with pytest.raises(ValueError, match="the second one"), piecewise() as each:
            each(work, 4, 2)
        assert threads_of_numpy() == {2}


@pytest.mark.parametrize("tokens", [900, 2 * SMALL // FEW])
def test_calibrated_rounding_has_the_same_bits_on_any_number_of_threads(tokens: int) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((2 * ROWS + 7, 2 * SMALL + 32)).astype(np.float32)
    seen = Moments(weight.shape[1])
    seen.add(rng.standard_normal((tokens, weight.shape[1])).astype(np.float32))
    results = []
    for threads in (1, 2, 3):
        with threadpool_limits(threads, "blas"):
            factor = InputFactor.of(seen, 0.01)
            rounded, error = gptq(weight, factor, grid=Grid(4), block=32, name="w")
        made = [value.tobytes() for value in vars(factor).values() if isinstance(value, np.ndarray)]
        results.append((*made, rounded.packed.tobytes(), rounded.scales.tobytes(), error))
    assert len(results[0]) >= 6
    assert results[0] == results[1] == results[2]
