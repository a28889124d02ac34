"""Running statistics against the whole at once, and activations that are no numbers."""

from __future__ import annotations

import numpy as np
import pytest

from arriero.errors import ArrieroError
from arriero.profiles.moments import AT_ONCE, FEW, Moments, check_finite


@pytest.mark.parametrize("features", [8, AT_ONCE + 5])
def test_moments_in_pieces_are_those_of_the_whole(features: int) -> None:
    few, many = features // FEW, features // FEW + 30
    rows = np.random.default_rng(0).standard_normal((many, features)).astype(np.float32)
    seen = Moments(features)
    for start, stop in ((0, 0), (0, few), (few, few + 5), (few + 5, many)):
        piece = rows[start:stop].copy()
        seen.add(piece)
        piece[...] = np.nan  # who gave it may write it over
        so_far = rows[:stop].astype(np.float64)
        assert (seen.rows is not None) == (stop <= few)
        if seen.rows is not None:
            np.testing.assert_array_equal(seen.rows, rows[:stop])
        np.testing.assert_allclose(seen.moment, so_far.T @ so_far, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(seen.diagonal, np.square(so_far).sum(0), rtol=1e-5)
        if seen.rows is None:
            assert (seen.moment[AT_ONCE:, :AT_ONCE] == seen.moment[:AT_ONCE, AT_ONCE:].T).all()
        off = np.random.default_rng(1).standard_normal((7, features)).astype(np.float32)
        assert seen.output_error(off) == pytest.approx(np.square(off.astype(np.float64) @ so_far.T).sum(), rel=1e-5)
    assert seen.count == many
    np.testing.assert_array_equal(seen.largest, np.abs(rows).max(0))


def test_without_second_moments_only_count_and_range_are_kept() -> None:
    seen = Moments(4, second=False)
    seen.add(np.array([[1, -2, 0, 3]], np.float32))
    assert (seen.count, seen.largest.tolist()) == (1, [1, 2, 0, 3])
    with pytest.raises(ValueError, match="not asked for"):
        _ = seen.moment


@pytest.mark.parametrize(("bad", "kind"), [(np.nan, "NaN"), (np.inf, "infinite")])
def test_what_is_not_finite_is_named_with_its_sample(bad: float, kind: str) -> None:
    rows = np.ones((4, 8), np.float32)
    check_finite(rows, "layer 3, expert 1", "7")
    rows[2, 5] = bad
    told = rf"layer 3, expert 1, calibration sample 9: 1 of 4 activation rows are not finite \(the first is {kind}\)"
    with pytest.raises(ArrieroError, match=told):
        check_finite(rows, "layer 3, expert 1", ["7", "7", "9", "9"])
