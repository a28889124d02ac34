"""The weights' layout for the CUDA kernels, read back by the formula in their header and by nothing of the packer's."""

from __future__ import annotations

import numpy as np
import pytest

from arriero.profiles.float8 import quantize_float8
from arriero.profiles.lanes import pack_float8_lanes, pack_lanes, row_words
from arriero.profiles.quantize import Quantized, quantize


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
            byte = lane + 8 * b + [0, 2, 1, 3, 4, 6, 5, 7][i]
            codes[:, k] = stored[:, byte]
        else:
            nibble = [0, 4, 1, 5, 2, 6, 3, 7][i]
            codes[:, k] = stored[:, lane + 4 * b + nibble // 2] >> 4 * (nibble % 2) & 15
    return codes


def codes_of(quantized: Quantized) -> np.ndarray:
    if quantized.bits == 8:
        return quantized.packed
    return np.stack([quantized.packed & 15, quantized.packed >> 4], -1).reshape(len(quantized.packed), -1)


@pytest.mark.parametrize(
    ("bits", "features", "block"), [(8, 64, 64), (8, 80, 80), (8, 96, 32), (4, 128, 32), (4, 96, 32)]
)
def test_every_integer_is_where_the_header_says(bits, features, block):
    weight = np.random.default_rng(features).standard_normal((5, features), dtype=np.float32)
    quantized = quantize(weight, bits=bits, block=block, name="weight")
    words = pack_lanes(quantized)
    assert words.dtype == np.int32
    assert words.shape == (5, row_words(bits, features))
    np.testing.assert_array_equal(read_back(words, bits, features), codes_of(quantized))


@pytest.mark.parametrize(("bits", "zero"), [(8, 128), (4, 8)])
def test_what_fills_up_a_group_is_zero(bits, zero):
    weight = np.random.default_rng(0).standard_normal((3, 32), dtype=np.float32)
    words = pack_lanes(quantize(weight, bits=bits, block=32, name="weight"))
    whole = 128 if bits == 4 else 64
    assert (read_back(words, bits, whole)[:, 32:] == zero).all()


@pytest.mark.parametrize("features", [64, 80, 144])
def test_every_float8_is_where_the_header_says(features):
    weight = np.random.default_rng(features).standard_normal((4, features), dtype=np.float32)
    floats = quantize_float8(weight, name="weight")
    words = pack_float8_lanes(floats)
    assert words.shape == (4, row_words(8, features))
    np.testing.assert_array_equal(read_back(words, 8, features), floats.bits)
    padding = -(-features // 64) * 64
    assert (read_back(words, 8, padding)[:, features:] == 0).all()


def test_experts_are_packed_as_each_alone():
    weight = np.random.default_rng(3).standard_normal((2, 3, 128), dtype=np.float32)
    stack = pack_lanes(quantize(weight, bits=4, block=64, name="weight"))
    for expert, words in enumerate(stack):
        np.testing.assert_array_equal(words, pack_lanes(quantize(weight[expert], bits=4, block=64, name="weight")))
