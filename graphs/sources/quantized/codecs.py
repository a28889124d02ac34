"""The number formats of quantised checkpoints as numpy reads them. Legend: n rows, K features."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
# E2M1 (OCP Microscaling Formats): 1 sign, 2 exponent, 1 fraction bits.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The 4-bit numbers in bytes [n, B], the low half first: [n, 2B]."""
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)


def e8m0(exponents: NDArray[np.uint8]) -> Floats:
    """The powers of two that bytes stand for as exponents with bias 127 (OCP Microscaling Formats)."""
    return np.ldexp(np.float32(1), exponents.astype(np.int32) - 127)


def spread(scales: NDArray[Any], features: int) -> Floats:
    """A scale for each of K features of scales [n, K / group], each of which is of as many features."""
    return np.repeat(scales.astype(np.float32), features // scales.shape[-1], axis=-1)
