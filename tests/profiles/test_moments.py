"""Running statistics against the whole at once, and activations that are no numbers."""

from __future__ import annotations

import numpy as np
import pytest

from arriero.errors import ArrieroError
from arriero.profiles.moments import AT_ONCE, Moments, check_finite


@pytest.mark.parametrize("features", [8, AT_ONCE + 5])
def test_moments_in_pieces_are_those_of_the_whole(features: int) -> None:
    rows = np.random.default_rng(0).standard_normal((37, features)).astype(np.float32)
    seen = Moments(features)
    for piece in np.split(rows, [0, 5, 20]):
        seen.add(piece)
        later = seen.moment[AT_ONCE:, :AT_ONCE]  # asked for in the middle, too
        assert (later == seen.moment[:AT_ONCE, AT_ONCE:].T).all()
    assert seen.count == 37
    np.testing.assert_array_equal(seen.largest, np.abs(rows).max(0))
    np.testing.assert_allclose(seen.moment, rows.T.astype(np.float64) @ rows, rtol=1e-5, atol=1e-5)


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
