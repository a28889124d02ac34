"""Sketches: linear, the same everywhere, unbiased, and off by what they say."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from arriero.runtimes.proof.metrics import ErrorSums, ShapesDiffer
from arriero.runtimes.proof.sketch import BUCKETS, PIECE, SketchedArray, WholeArray, seeded_features, sketch

SKETCH, FEATURES = "e1e193df3b3998e7", "3c2a8c5ddf9e769e"


def hidden(seed: int, tokens: int = 40, width: int = 640) -> np.ndarray:
    """A residual stream with a few channels a hundred times the others, as real ones have."""
    array = np.random.default_rng(seed).normal(size=(1, tokens, width))
    array[..., [3, 77, 200]] *= 100
    return array.astype(np.float32)


def test_a_sketch_is_linear():
    left, right = hidden(1).astype(np.float64), hidden(2).astype(np.float64)
    both = sketch(2 * left - right, 5, "x")
    np.testing.assert_allclose(both, 2 * sketch(left, 5, "x") - sketch(right, 5, "x"), rtol=1e-9, atol=1e-7)


def test_sketches_are_the_same_on_every_machine():
    """Golden bits: PCG64's raw draws do not change with numpy, and the sums are of whole numbers."""
    whole = np.arange(3 * PIECE // 2, dtype=np.float32) % 251
    assert hashlib.sha256(sketch(whole, 1, "layer-000 of case 0").tobytes()).hexdigest()[:16] == SKETCH
    assert hashlib.sha256(seeded_features(1, "features", 3, 5).tobytes()).hexdigest()[:16] == FEATURES


@pytest.mark.parametrize("noise", [1e-5, 0.01])
def test_the_error_is_unbiased_and_its_stated_error_right(noise):
    reference, seeds = hidden(1), 200
    candidate = reference + noise * hidden(8)
    exact = ErrorSums.of(reference, candidate)
    found = [SketchedArray.of(reference, seed, "layer").errors(candidate) for seed in range(seeds)]
    noises = np.array([one.noise for one in found])
    assert abs(noises.mean() / exact.noise - 1) < 3 * np.sqrt(2 / BUCKETS / seeds)
    assert noises.std() / exact.noise < 1.2 * np.sqrt(2 / BUCKETS)
    within = [abs(one.relative_l2 - exact.relative_l2) <= 2 * one.relative_l2_error for one in found]
    assert np.mean(within) > 0.9
    assert found[0].signal == pytest.approx(exact.signal)
    within = [abs(one.snr_db - exact.snr_db) <= 2 * one.snr_db_error for one in found]
    assert np.mean(within) > 0.9


def test_equal_arrays_have_no_error_and_broken_ones_never_pass():
    reference = hidden(3)
    sketched = SketchedArray.of(reference, 1, "x")
    same = sketched.errors(reference)
    assert (same.noise, same.relative_l2, same.relative_l2_error) == (0.0, 0.0, 0.0)
    for bad in (np.nan, np.inf):
        broken = reference.copy()
        broken[0, 1, 2] = bad
        assert not sketched.errors(broken).relative_l2 < 1e9
    with pytest.raises(ShapesDiffer, match=r"\[1, 40, 640\]"):
        sketched.errors(reference[0])
    with pytest.raises(ShapesDiffer):
        WholeArray(reference).errors(reference[:, 1:])


def test_seeded_features_are_spread_over_their_range():
    features = seeded_features(4, "case", 50, 200)
    assert features.dtype == np.float32
    assert features.shape == (50, 200)
    assert -1 <= features.min() < -0.99
    assert 0.99 < features.max() < 1
    assert abs(features.mean()) < 0.02
    assert seeded_features(4, "case", 0, 200).shape == (0, 200)
    assert (seeded_features(4, "other", 50, 200) != features).any()
