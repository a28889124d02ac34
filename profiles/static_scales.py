"""One scale for all inputs of a matrix, fixed beforehand, and the balancing that makes one scale do.

SmoothQuant (Xiao et al. 2023, "Accurate and Efficient Post-Training Quantization for Large Language Models"): input
feature j is divided by s_j and weight column j multiplied by it, which changes no product. With
s_j = max|x_j|^a / max|w_j|^(1-a) the exponent `a` moves the unevenness of the inputs into the weights, which have finer
scales. Here the division happens in the multiplication that quantises the inputs, so it costs nothing and touches no
other layer. Legend: N output features, K input features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arriero.errors import ArrieroError
from arriero.profiles.float8 import LARGEST, Float8, quantize_float8
from arriero.profiles.quantize import quantize

Floats = NDArray[np.float32]
TOP = 127
SPREAD = 1e5  # how far from their geometric mean the divisors may lie


@dataclass(frozen=True)
class InputScale:
    """`divisors` f32 [..., K], 1 without balancing; `largest` f32 [..., 1], the largest magnitude after dividing."""

    divisors: Floats
    largest: Floats


@dataclass(frozen=True)
class StaticInt8:
    """A matrix for known input ranges: y = scales * sum of (rint(x * multiplier), clipped to ±127) times integers.

    `packed` u8 [..., N, K] holds each integer plus 128, `scales` f32 [..., N], `multiplier` f32 [..., K].
    """

    packed: NDArray[np.uint8]
    scales: Floats
    multiplier: Floats


@dataclass(frozen=True)
class StaticFloat8:
    """A matrix for known input ranges: y = scales * sum of e4m3(x * multiplier) times E4M3 weights; shapes as above.

    `bits` u8 [..., N, K] are the weights' E4M3 bytes.
    """

    bits: NDArray[np.uint8]
    scales: Floats
    multiplier: Floats


def fit_inputs(largest: Floats, columns: Floats, smooth: float | None, where: str) -> InputScale:
    """The scale for inputs of largest magnitudes `largest` [K] into weight columns of magnitudes `columns` [K].

    Features that calibration saw at 0 only are divided by the geometric mean of the others' divisors. Raises
    ArrieroError when every input was 0: no scale follows from that, and 1 would be a guess.
    """
    if not largest.any():
        raise ArrieroError(
            "calibration saw zeros only in the inputs of this matrix",
            where=where,
            remedy="Give it a scheme that needs no calibration, or calibrate on other data",
        )
    divisors = np.ones_like(largest)
    seen = (largest > 0) & (columns > 0)
    if smooth is not None and seen.any():
        powers = smooth * np.log(largest[seen]) - (1 - smooth) * np.log(columns[seen])
        limit = np.log(SPREAD)
        divisors[seen] = np.exp(np.clip(powers - powers.mean(), -limit, limit))
    return InputScale(divisors, (largest / divisors).max(keepdims=True))


def guess_inputs(largest: Floats, features: int) -> InputScale:
    """The scale of matrices whose inputs nobody saw: as if they were as large as the weights, `largest` [..., 1].

    The RTN baseline of a static scale. An all-zero matrix gives 0 whatever the scale, so it gets 1.
    """
    known = np.where(largest > 0, largest, np.float32(1))
    return InputScale(np.ones((*largest.shape[:-1], features), np.float32), known)


def quantize_static(weight: Floats, inputs: InputScale, *, name: str) -> StaticInt8:
    """Round `weight` f32 [..., N, K] for inputs as `inputs` describes them. Raises ArrieroError as `quantize` does."""
    balanced = weight * inputs.divisors[..., None, :]
    rounded = quantize(balanced, bits=8, block=weight.shape[-1], name=name, scale_type=np.float32)
    steps = inputs.largest / np.float32(TOP)
    return StaticInt8(rounded.packed, rounded.scales[..., 0] * steps, np.reciprocal(inputs.divisors * steps))


def quantize_static_float8(weight: Floats, inputs: InputScale, *, name: str) -> StaticFloat8:
    """The same in E4M3: the largest weight of an output and the largest input become 448."""
    rounded: Float8 = quantize_float8(weight * inputs.divisors[..., None, :], name=name)
    steps = inputs.largest / np.float32(LARGEST)
    return StaticFloat8(rounded.bits, rounded.scales * steps, np.reciprocal(inputs.divisors * steps))
