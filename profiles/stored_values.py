"""What a matrix stands for once it is stored in a scheme that needs no calibration."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from arriero.profiles.float8 import dequantize_float8, quantize_float8
from arriero.profiles.quantize import Quantized, dequantize, quantize
from arriero.profiles.schemes import Fp8, Int8Dynamic, IntBlock, Scheme


def nearest(weight: NDArray[np.float32], scheme: IntBlock, *, name: str) -> Quantized:
    """`weight` [..., N, K] rounded to nearest as `scheme` has it. Raises ArrieroError as `quantize` does."""
    return quantize(weight, bits=scheme.bits, block=scheme.block, name=name, grid=scheme.grid)


def stored_values(weight: NDArray[np.float32], scheme: Scheme, *, name: str) -> NDArray[np.float32]:
    """The values f32 [..., N, K] of `weight` after rounding to nearest. Raises ArrieroError as `quantize` does."""
    if isinstance(scheme, Fp8):
        return dequantize_float8(quantize_float8(weight, name=name))
    if isinstance(scheme, Int8Dynamic):
        return dequantize(quantize(weight, bits=8, block=weight.shape[-1], name=name, scale_type=np.float32))
    if isinstance(scheme, IntBlock):
        return dequantize(nearest(weight, scheme, name=name))
    return weight
