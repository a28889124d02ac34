"""Experts' matrices in the layout that our own CUDA kernels read: output-major, each lane's values side by side.

The layouts are told in `export/compile/cuda/arriero_experts.h`. Legend: N output features, K input features;
leading axes (experts) are kept.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from arriero.profiles.float8 import Float8
from arriero.profiles.quantize import Quantized

GROUP_BYTES = 64
LANES = 4
STEP = 32  # input features of a block, 8 of each lane
# Where each of a lane's 8 values lies: whole bytes of two words, or nibbles of one, lowest first.
BYTE_ORDER = (0, 2, 1, 3, 4, 6, 5, 7)
NIBBLE_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Words = NDArray[np.int32]


def row_words(bits: int, features: int) -> int:
    """The 32-bit words that one output's `features` take at `bits` bits, whole groups."""
    return -(-features * bits // (8 * GROUP_BYTES)) * GROUP_BYTES // 4


def pack_lanes(quantized: Quantized) -> Words:
    """Reorder offset-binary codes [..., N, K*bits/8] to words [..., N, row_words]; the scales stay as they are."""
    codes, bits = quantized.packed, quantized.bits
    if bits == 8:
        return _bytes(_by_lane(codes, 8, padding=128))
    halves: NDArray[np.uint8] = np.stack([codes & np.uint8(15), codes >> np.uint8(4)], -1)
    values = _by_lane(halves.reshape(*codes.shape[:-1], -1), 4, padding=8)[..., NIBBLE_ORDER]
    return _words(values[..., 0::2] | (values[..., 1::2] << np.uint8(4)))


def pack_float8_lanes(quantized: Float8) -> Words:
    """Reorder E4M3 bytes [..., N, K] to words [..., N, row_words]; the scales stay as they are."""
    return _bytes(_by_lane(quantized.bits, 8, padding=0))


def _by_lane(values: NDArray[np.uint8], bits: int, padding: int) -> NDArray[np.uint8]:
    """[..., K] -> [..., groups, lane 4, block, 8], padded to whole groups."""
    *leading, features = values.shape
    group = GROUP_BYTES * 8 // bits
    groups = -(-features // group)
    full = np.full((*leading, groups * group), padding, np.uint8)
    full[..., :features] = values
    return full.reshape(*leading, groups, group // STEP, LANES, STEP // LANES).swapaxes(-3, -2)


def _bytes(values: NDArray[np.uint8]) -> Words:
    return _words(values[..., BYTE_ORDER])


def _words(values: NDArray[np.uint8]) -> Words:
    """[..., groups, lane, block, bytes] -> [..., words]."""
    return np.ascontiguousarray(values).reshape(*values.shape[:-4], -1).view("<i4").astype(np.int32, copy=False)
