"""Experts' matrices in the layout that our own CUDA kernels read: output-major, each lane's values side by side.

The layouts are told in `export/compile/cuda/arriero_experts.h`. Legend: N output features, K input features;
leading axes (experts) are kept.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from arriero.profiles.quantize import Quantized

GROUP_BYTES = 64
LANES = 4
STEP = 32  # input features of a block, 8 of each lane
NIBBLE_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of a lane's 8 values in a word, lowest first
Words = NDArray[np.int32]


def row_words(bits: int, features: int) -> int:
    """The 32-bit words that one output's `features` take at `bits` bits, whole groups."""
    return -(-features * bits // (8 * GROUP_BYTES)) * GROUP_BYTES // 4


def pack_byte_lanes(codes: NDArray[np.uint8]) -> Words:
    """Reorder two's complement or E4M3 bytes [..., N, K] to words [..., N, row_words]."""
    return _words(_by_lane(codes, 8, padding=0))


def pack_int4_lanes(quantized: Quantized) -> Words:
    """Reorder offset-binary nibbles [..., N, K/2] to words [..., N, row_words]; the scales stay as they are."""
    codes = quantized.packed
    halves: NDArray[np.uint8] = np.stack([codes & np.uint8(15), codes >> np.uint8(4)], -1)
    values = _by_lane(halves.reshape(*codes.shape[:-1], -1), 4, padding=8)[..., NIBBLE_ORDER]
    return _words(values[..., 0::2] | (values[..., 1::2] << np.uint8(4)))


def _by_lane(values: NDArray[np.uint8], bits: int, padding: int) -> NDArray[np.uint8]:
    """[..., K] -> [..., groups, lane 4, block, 8], padded to whole groups."""
    *leading, features = values.shape
    group = GROUP_BYTES * 8 // bits
    groups = -(-features // group)
    full = np.full((*leading, groups * group), padding, np.uint8)
    full[..., :features] = values
    return full.reshape(*leading, groups, group // STEP, LANES, STEP // LANES).swapaxes(-3, -2)


def _words(values: NDArray[np.uint8]) -> Words:
    """[..., groups, lane, block, bytes] -> [..., words]."""
    return np.ascontiguousarray(values).reshape(*values.shape[:-4], -1).view("<i4").astype(np.int32, copy=False)
