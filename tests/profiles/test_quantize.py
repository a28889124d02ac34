"""The block quantiser's promises, on many random matrices of many magnitudes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from arriero.errors import ArrieroError
from arriero.profiles.quantize import Quantized, dequantize, quantize


def draw(seed: int, largest: int = 5) -> tuple[np.ndarray, int]:
    """A random matrix with rows of very different sizes, some zero, and a block size that divides it.

    Its values are below ten to the power of `largest`.
    """
    rng = np.random.default_rng(seed)
    block = int(rng.choice([16, 32, 64]))
    shape = (*rng.integers(1, 4, size=rng.integers(0, 2)), int(rng.integers(1, 9)), block * int(rng.integers(1, 5)))
    weight = rng.standard_normal(shape) * 10.0 ** rng.integers(-30, largest, size=(*shape[:-1], 1))
    weight[rng.random(shape) < 0.2] = 0
    return weight.astype(np.float32), block


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("scale_type", "largest"), [(np.float16, 5), (np.float32, 30)])
@pytest.mark.parametrize("seed", range(40))
def test_the_error_is_at_most_half_a_step_and_every_scale_is_sound(
    bits: int, scale_type: type[np.floating[Any]], largest: int, seed: int
) -> None:
    weight, block = draw(seed, largest)
    result = quantize(weight, bits=bits, block=block, name="w", scale_type=scale_type)
    assert result.packed.dtype == np.uint8
    assert result.packed.shape == (*weight.shape[:-1], weight.shape[-1] * bits // 8)
    assert result.scales.dtype == np.float32
    assert result.scales.shape == (*weight.shape[:-1], weight.shape[-1] // block)
    assert np.isfinite(result.scales).all()
    assert (result.scales > 0).all()
    assert (result.scales.astype(scale_type) == result.scales).all()
    back = dequantize(result)
    assert back.shape == weight.shape
    assert back.dtype == np.float32
    steps = np.repeat(result.scales, block, -1)
    assert (np.abs(back - weight) <= steps * np.float32(0.5001)).all()
    assert (back[weight == 0] == 0).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("seed", range(10))
def test_quantising_again_changes_nothing(bits: int, seed: int) -> None:
    weight, block = draw(seed)
    once = dequantize(quantize(weight, bits=bits, block=block, name="w"))
    twice = dequantize(quantize(once, bits=bits, block=block, name="w"))
    np.testing.assert_allclose(twice, once, rtol=1e-6)  # the largest value may come back one ulp off


def test_the_largest_magnitude_of_a_block_survives_to_the_last_bits() -> None:
    weight = np.linspace(-3, 2, 64, dtype=np.float32)[None]
    for scale_type, error in ((np.float16, 2**-11), (np.float32, 1e-6)):
        back = dequantize(quantize(weight, bits=8, block=32, name="w", scale_type=scale_type))
        assert back[0, 0] == pytest.approx(-3, rel=error)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_float16_can_scale_is_rounded_to_half_a_step_and_the_rest_refused(bits: int) -> None:
    """Around the smallest and the largest scales that there are, each block's largest in turn positive and negative."""
    top = 2 ** (bits - 1) - 1
    largest = np.float32(top) * np.float32([2**-26, 2**-25, 2**-24, 1.49 * 2**-24, 2**-14, 60000, 65504])
    weight = np.linspace(-1, 1, 16, dtype=np.float32) * largest[:, None]
    result = quantize(weight, bits=bits, block=16, name="w")
    assert (np.abs(dequantize(result) - weight) <= result.scales / 2 * np.float32(1.001)).all()
    assert result.scales[-1] == 65504
    with pytest.raises(ArrieroError, match=r"w: 1 blocks need a scale of up to 65\d\d\d.*values up to "):
        quantize(weight * np.float32(1.001), bits=bits, block=16, name="w")


def test_byte_layout_is_the_kernels() -> None:
    weight = np.zeros((1, 16), np.float32)
    weight[0, :3] = [7, -7, 1]
    eight = quantize(weight, bits=8, block=16, name="w")
    assert eight.packed[0, :4].tolist() == [255, 1, 146, 128]  # 1 / (7/127) = 18.1
    four = quantize(weight, bits=4, block=16, name="w")
    assert four.packed[0, 0] == 15 | (1 << 4)  # element 0 in the low nibble, offset by 8
    assert four.packed[0, 1] == 9 | (8 << 4)


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_and_subnormal_blocks_come_back_as_zero(bits: int) -> None:
    weight = np.zeros((2, 32), np.float32)
    weight[1] = 1e-42
    result = quantize(weight, bits=bits, block=16, name="w")
    assert (result.scales == 1).all()
    assert (dequantize(result) == 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_is_refused_by_name(bad: float) -> None:
    weight = np.ones((2, 32), np.float32)
    weight[1, 5] = bad
    with pytest.raises(ArrieroError, match=r"layers\.3\.w: 1 of 64 values are NaN or infinite"):
        quantize(weight, bits=8, block=32, name="layers.3.w")


def test_the_largest_float_does_not_overflow() -> None:
    weight = np.full((1, 16), np.finfo(np.float32).max, np.float32)
    stored = quantize(weight, bits=8, block=16, name="w", scale_type=np.float32)
    assert np.isfinite(dequantize(stored)).all()


def test_a_block_that_does_not_divide_the_features_is_refused_by_name() -> None:
    with pytest.raises(ArrieroError, match="w: 48 input features do not divide into blocks of 32"):
        quantize(np.ones((1, 48), np.float32), bits=8, block=32, name="w")


def test_bits_are_four_or_eight() -> None:
    with pytest.raises(ValueError, match="4 or 8"):
        quantize(np.ones((1, 16), np.float32), bits=5, block=16, name="w")
    assert isinstance(quantize(np.ones((1, 16), np.float32), bits=4, block=16, name="w"), Quantized)
