"""The weights' layout for the CUDA kernels, read back by the formula in their header and by nothing of the packer's."""

from __future__ import annotations

import numpy as np
import pytest

from arriero.graphs.stored.mma_layout import pack_byte_lanes, pack_int4_lanes, row_words
from arriero.profiles.quantize import quantize


def read_back(words: np.ndarray, bits: int, features: int) -> np.ndarray:
    """The codes [N, K] in `words` [N, W], feature by feature."""
    group = 128 if bits == 4 else 64
    stored = words.astype("<i4").view(np.uint8)
    codes = np.empty((len(words), features), np.uint8)
    for k in range(features):
        g, within = divmod(k, group)
        b, t, i = within // 32, within % 32 // 8, within % 8
        lane = 64 * g + 16 * t
        if bits == 8:
            codes[:, k] = stored[:, lane + 8 * b + i]
        else:
            nibble = [0, 4, 1, 5, 2, 6, 3, 7][i]
            codes[:, k] = stored[:, lane + 4 * b + nibble // 2] >> 4 * (nibble % 2) & 15
    return codes


@pytest.mark.parametrize("features", [64, 80, 144])
def test_every_byte_is_where_the_header_says(features):
    codes = np.random.default_rng(features).integers(0, 256, (5, features), np.uint8)
    words = pack_byte_lanes(codes)
    assert words.dtype == np.int32
    assert words.shape == (5, row_words(8, features))
    padded = read_back(words, 8, -(-features // 64) * 64)
    np.testing.assert_array_equal(padded[:, :features], codes)
    assert (padded[:, features:] == 0).all()


@pytest.mark.parametrize("features", [96, 128, 160])
def test_every_nibble_is_where_the_header_says(features):
    weight = np.random.default_rng(features).standard_normal((5, features), dtype=np.float32)
    quantized = quantize(weight, bits=4, block=32, name="weight")
    words = pack_int4_lanes(quantized)
    assert words.dtype == np.int32
    assert words.shape == (5, row_words(4, features))
    padded = read_back(words, 4, -(-features // 128) * 128)
    codes = np.stack([quantized.packed & 15, quantized.packed >> 4], -1).reshape(5, -1)
    np.testing.assert_array_equal(padded[:, :features], codes)
    assert (padded[:, features:] == 8).all()


def test_experts_are_packed_as_each_alone():
    weight = np.random.default_rng(3).standard_normal((2, 3, 128), dtype=np.float32)
    stack = pack_int4_lanes(quantize(weight, bits=4, block=64, name="weight"))
    for expert, words in enumerate(stack):
        np.testing.assert_array_equal(words, pack_int4_lanes(quantize(weight[expert], bits=4, block=64, name="weight")))
