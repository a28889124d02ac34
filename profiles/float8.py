"""E4M3 floats (OCP 8-bit Floating Point: 1 sign, 4 exponent, 3 fraction bits, largest 448, no infinity) with scales.

Legend: N output features, K input features.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from arriero.profiles.quantize import check_weight

LARGEST = 448.0
FP8_SINCE = 89  # the first GPUs whose tensor cores multiply it, by their compute capability times ten


@dataclass(frozen=True)
class Float8:
    """`bits` u8 [..., N, K], the E4M3 bytes; `scales` f32 [..., N], finite and not zero."""

    bits: NDArray[np.uint8]
    scales: NDArray[np.float32]


def quantize_float8(weight: NDArray[np.float32], *, name: str) -> Float8:
    """Round `weight` f32 [..., N, K] to E4M3 times a scale per output, its largest magnitude / 448, ties to even.

    An all-zero output (or one too small for a normal float32 scale) gets scale 1 and zeros. Raises ArrieroError naming
    the tensor when a value is not finite.
    """
    largest = check_weight(weight, bits=8, block=weight.shape[-1], name=name)[..., 0]
    scales = (largest / np.float32(LARGEST)).astype(np.float32)
    scales[scales < np.finfo(np.float32).tiny] = 1.0
    return Float8(to_bits(weight / scales[..., None]), scales)


def to_bits(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The nearest E4M3 byte of each finite value; what is beyond 448 saturates, so that no NaN appears."""
    return np.clip(values, -LARGEST, LARGEST).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def dequantize_float8(quantized: Float8) -> NDArray[np.float32]:
    """The float32 values [..., N, K] that `quantized` stands for."""
    return quantized.bits.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * quantized.scales[..., None]
