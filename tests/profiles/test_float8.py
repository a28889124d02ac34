"""E4M3 rounding against the table of all its values."""

from __future__ import annotations

import numpy as np
import pytest

from arriero.errors import ArrieroError
from arriero.graphs.sources.safetensors_header import to_float32
from arriero.profiles.float8 import dequantize_float8, quantize_float8, to_bits

TABLE = to_float32(np.arange(256, dtype=np.uint8), "F8_E4M3")


def test_every_value_becomes_the_nearest_of_the_table() -> None:
    rng = np.random.default_rng(0)
    values = (rng.standard_normal(4000) * 10.0 ** rng.uniform(-4, 3, 4000)).astype(np.float32)
    back = TABLE[to_bits(values)]
    finite = TABLE[np.isfinite(TABLE)]
    best = np.abs(values[:, None] - finite).min(-1)
    np.testing.assert_array_equal(np.abs(values - back), best)


def test_what_is_too_large_saturates_and_nothing_becomes_nan() -> None:
    values = np.array([448, 449, 464, 465, 1e6, 3e38, -1e6, 0, -0.0, 1e-9], np.float32)
    np.testing.assert_array_equal(TABLE[to_bits(values)], [448, 448, 448, 448, 448, 448, -448, 0, 0, 0])


def test_each_output_has_its_own_scale_and_uses_the_whole_range() -> None:
    rng = np.random.default_rng(1)
    weight = (rng.standard_normal((3, 5, 40)) * 10.0 ** rng.uniform(-6, 4, (3, 5, 1))).astype(np.float32)
    rounded = quantize_float8(weight, name="w")
    assert rounded.scales.shape == (3, 5)
    assert (np.abs(TABLE[rounded.bits]).max(-1) == 448).all()
    # Half a step of three fraction bits, or half the smallest step of the scale.
    limit = np.maximum(np.abs(weight) / 16, rounded.scales[..., None] * 2.0**-10) * 1.0001
    assert (np.abs(dequantize_float8(rounded) - weight) <= limit).all()


def test_zero_and_tiny_outputs_are_zeros_with_a_sound_scale() -> None:
    weight = np.zeros((3, 8), np.float32)
    weight[1] = 1e-44
    weight[2, 0] = 3e38
    rounded = quantize_float8(weight, name="w")
    assert np.isfinite(rounded.scales).all()
    assert (rounded.scales > 0).all()
    assert (dequantize_float8(rounded)[:2] == 0).all()
    assert dequantize_float8(rounded)[2, 0] == pytest.approx(3e38)


def test_a_broken_weight_is_named() -> None:
    weight = np.ones((2, 8), np.float32)
    weight[1, 2] = np.inf
    with pytest.raises(ArrieroError, match=r"layers\.3\.w: 1 of 16 values are NaN or infinite"):
        quantize_float8(weight, name="layers.3.w")
