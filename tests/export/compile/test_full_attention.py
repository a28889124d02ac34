"""Attention without a cache of the C++ kernels against float64 numpy, at every level that can be run here."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from tests.guarded_kernels import Guarded, assert_close, normal

SHAPES = [(2, 577, 88), (3, 97, 64), (5, 65, 16), (1, 96, 128), (4, 1, 24), (2, 130, 5), (1, 3, 1)]


def softmax_mean(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """softmax(q kᵀ / sqrt(D)) v [B, L, D] in float64."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scores = q @ k.swapaxes(1, 2) / q.shape[2] ** 0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights @ v / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_token_is_the_mean_of_all_values_by_its_scores(kernels_at_level, draw, shape):
    q, k, v = (normal(draw, *shape) for _ in range(3))
    assert_close(kernels_at_level.full_attention(q, k, v), softmax_mean(q, k, v), 1.0, 1e-5)


def test_large_scores_do_not_overflow(kernels_at_level, draw):
    q, k, v = (normal(draw, 2, 70, 64) * np.float32(scale) for scale in (100, 100, 1))
    # scores near 1e5 have float32 errors near 1e-2, which exp turns into the same relative error of a weight
    assert_close(kernels_at_level.full_attention(q, k, v), softmax_mean(q, k, v), 1.0, 0.05)


def test_what_is_not_finite_reaches_its_own_sequence_alone(kernels_at_level, draw):
    q, k, v = (normal(draw, 3, 70, 24) for _ in range(3))
    k[1, 69] = np.nan
    found = kernels_at_level.full_attention(q, k, v)
    assert np.isnan(found[1]).all()
    assert np.isfinite(found[[0, 2]]).all()


def test_it_has_the_same_bits_beside_others_and_in_any_number_of_parts(library, draw):
    q, k, v = (normal(draw, 3, 200, 40) for _ in range(3))
    first, *others = (Guarded(library, parts).full_attention(q, k, v) for parts in (1, 2, 7))
    for other in others:
        assert_array_equal(other, first)
    alone = Guarded(library, 2).full_attention(q[1:2], k[1:2], v[1:2])
    assert_array_equal(alone[0], first[1])
