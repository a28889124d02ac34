"""Static activation scales and SmoothQuant balancing, against the products they must not change."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from arriero.errors import ArrieroError
from arriero.profiles.float8 import to_bits
from arriero.profiles.static_scales import InputScale, fit_inputs, guess_inputs, quantize_static, quantize_static_float8


def draw(seed: int, outputs: int = 32, features: int = 64, tokens: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """A weight [N, K] and inputs [n, K] a few features of which are far larger than the others."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, features))
    x[:, ::16] *= 30
    return rng.standard_normal((outputs, features)).astype(np.float32), x.astype(np.float32)


def multiply(x: np.ndarray, weight: np.ndarray, inputs: InputScale) -> np.ndarray:
    made = quantize_static(weight, inputs, name="w")
    integers = np.clip(np.rint(x * made.multiplier), -127, 127)
    return integers @ (made.packed.astype(np.float64) - 128).T * made.scales


def error(x: np.ndarray, weight: np.ndarray, inputs: InputScale) -> float:
    exact = x @ weight.T
    return float(np.linalg.norm(multiply(x, weight, inputs) - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("smooth", [None, 0.0, 0.5, 1.0])
def test_the_product_is_the_matrix_product_up_to_rounding(smooth: float | None) -> None:
    weight, x = draw(0)
    inputs = fit_inputs(np.abs(x).max(0), np.abs(weight).max(0), smooth, "w")
    assert error(x, weight, inputs) < 0.05  # measured 0.010 (at 0.5) to 0.034 (at 0, which balances the weights)


@pytest.mark.parametrize("seed", range(5))
def test_balancing_pays_where_features_are_uneven(seed: int) -> None:
    weight, x = draw(seed)
    largest, columns = np.abs(x).max(0), np.abs(weight).max(0)
    small = np.delete(np.arange(64), np.s_[::16])

    def without_outliers(smooth: float | None) -> float:
        """Error on inputs whose large features are 0: what the one scale leaves of the small ones."""
        quiet = x.copy()
        quiet[:, ::16] = 0
        return error(quiet, weight, fit_inputs(largest, columns, smooth, "w"))

    assert without_outliers(0.5) < 0.5 * without_outliers(None)
    balanced = fit_inputs(largest, columns, 0.5, "w").divisors
    assert balanced[::16].min() > balanced[small].max()


def test_balanced_magnitudes_are_smoothquants() -> None:
    weight, x = draw(1)
    largest, columns = np.abs(x).max(0), np.abs(weight).max(0)
    for exponent in (0.25, 0.5):
        divisors = fit_inputs(largest, columns, exponent, "w").divisors
        wanted = largest**exponent / columns ** (1 - exponent)
        np.testing.assert_allclose(divisors / divisors[0], wanted / wanted[0], rtol=1e-5)


def test_every_seen_input_fits_and_the_widest_uses_the_whole_range() -> None:
    weight, x = draw(2)
    for smooth in (None, 0.5):
        made = quantize_static(weight, fit_inputs(np.abs(x).max(0), np.abs(weight).max(0), smooth, "w"), name="w")
        assert np.abs(x * made.multiplier).max() == pytest.approx(127, rel=1e-5)


def test_features_and_columns_that_are_zero_are_sound() -> None:
    weight, x = draw(3)
    x[:, 5] = 0
    weight[:, 6] = 0
    inputs = fit_inputs(np.abs(x).max(0), np.abs(weight).max(0), 0.5, "w")
    assert np.isfinite(inputs.divisors).all()
    assert (inputs.divisors > 0).all()
    x[:, 5] = 1  # seen later on
    assert error(x, weight, inputs) < 0.03


def test_zeros_only_give_no_scale_but_a_sentence() -> None:
    with pytest.raises(ArrieroError, match=r"layers\.2\.x: calibration saw zeros only in the inputs of this matrix"):
        fit_inputs(np.zeros(4, np.float32), np.ones(4, np.float32), 0.5, "layers.2.x")


def test_the_rtn_guess_takes_inputs_to_be_as_large_as_the_weights() -> None:
    weight, _ = draw(4)
    inputs = guess_inputs(np.array([[3.5], [0.0]], np.float32), 64)
    assert inputs.divisors.shape == (2, 64)
    np.testing.assert_array_equal(inputs.largest, [[3.5], [1.0]])  # an all-zero matrix: any scale gives 0
    made = quantize_static(weight, guess_inputs(np.abs(weight).max(keepdims=True)[0], 64), name="w")
    assert np.abs(weight).max() * made.multiplier[0] == pytest.approx(127, rel=1e-6)


@pytest.mark.parametrize("smooth", [None, 0.5])
def test_static_floats_give_the_product_up_to_rounding_and_use_their_whole_range(smooth: float | None) -> None:
    weight, x = draw(6)
    made = quantize_static_float8(weight, fit_inputs(np.abs(x).max(0), np.abs(weight).max(0), smooth, "w"), name="w")
    assert np.abs(x * made.multiplier).max() == pytest.approx(448, rel=1e-5)
    codes, inputs = (
        bits.view(ml_dtypes.float8_e4m3fn).astype(np.float64) for bits in (made.bits, to_bits(x * made.multiplier))
    )
    assert (np.abs(codes).max(1) == 448).all()
    exact = x @ weight.T
    found = inputs @ codes.T * made.scales
    assert (
        np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.06
    )  # 2^-4 at most per factor, half of it on average
