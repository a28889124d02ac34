"""Quantised matrices in the layout that our own CPU kernels read: panels of 16 output features, zero-padded.

The layouts are told in `export/compile/kernels/arriero_kernels.h`. Legend: N output features, K input features,
P = ceil(N / 16) panels, J = K / block, F expert width; leading axes (experts) are kept.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from arriero.profiles.quantize import Quantized, split_codes

PANEL = 16
STEPS = {8: 4, 4: 8, 3: 16, 2: 16}  # input features that lie together, by bits of a code
Codes = NDArray[np.uint8]
Values = TypeVar("Values", bound=np.generic)
Fp8 = tuple[NDArray[np.uint8], NDArray[np.float32]]


def pack_panels(quantized: Quantized) -> Quantized:
    """Reorder packed [..., N, K*bits/8] and scales [..., N, J] to [..., P, K/S, 2*bits*S] and [..., P, J, 16].

    S is the features of one step, `STEPS[bits]`.
    """
    bits = quantized.bits
    rows = _rows(split_codes(quantized.packed, bits), 2 ** (bits - 1))
    # [..., P, K / S, 16, S / 4, 4]
    quads = rows.reshape(*rows.shape[:-1], -1, STEPS[bits] // 4, 4).swapaxes(-4, -3)
    packed = np.ascontiguousarray(_ARRANGE[bits](quads))
    scales = np.ascontiguousarray(_rows(quantized.scales, 0).swapaxes(-2, -1))
    return replace(quantized, packed=packed, scales=scales)


def _bytes(quads: Codes) -> Codes:
    return _flat(quads[..., 0, :])


def _nibbles(quads: Codes) -> Codes:
    return _flat(quads[..., 0, :] | quads[..., 1, :] << np.uint8(4))


def _twos(quads: Codes) -> Codes:
    """The low two bits of each code, [..., 16, 4, 4] -> [..., 64]."""
    order = (2, 0, 3, 1)  # the lowest bits of a byte are of quad 2
    return _flat(_joined([(quads[..., quad, :] & np.uint8(3)) << np.uint8(2 * at) for at, quad in enumerate(order)]))


def _twos_and_thirds(quads: Codes) -> Codes:
    """And the third ones, [..., 16, 4, 4] -> [..., 96]."""
    nibbles = _flat(_joined([quads[..., quad, :] >> np.uint8(2) << np.uint8(quad) for quad in range(4)]))
    return np.concatenate([_twos(quads), nibbles[..., :32] | nibbles[..., 32:] << np.uint8(4)], -1)


def _joined(parts: Sequence[Codes]) -> Codes:
    return functools.reduce(np.bitwise_or, parts)


def _flat(values: Codes) -> Codes:
    """[..., 16, 4] -> [..., 64]."""
    return values.reshape(*values.shape[:-2], 4 * PANEL)


_ARRANGE = {8: _bytes, 4: _nibbles, 3: _twos_and_thirds, 2: _twos}


def pack_gate_up_panels(quantized: Quantized) -> Quantized:
    """Pack the halves gate | up of [..., 2F, K] in turns, gate 0, up 0, gate 1, ..: 2 ceil(F / 16) panels."""
    width = quantized.packed.shape[-2] // 2
    gate, up = (
        pack_panels(replace(quantized, packed=quantized.packed[half], scales=quantized.scales[half]))
        for half in (np.s_[..., :width, :], np.s_[..., width:, :])
    )
    return replace(quantized, packed=_in_turns(gate.packed, up.packed), scales=_in_turns(gate.scales, up.scales))


def pack_e4m3_panels(codes: NDArray[np.uint8], scales: NDArray[np.float32]) -> Fp8:
    """Reorder FP8 codes [..., N, K] and their scales [..., N] to [..., P, K, 16] and [..., P, 16]."""
    return (
        np.ascontiguousarray(_rows(codes, 0).swapaxes(-2, -1)),
        np.ascontiguousarray(_rows(scales[..., None], 0)[..., 0]),
    )


def pack_gate_up_e4m3_panels(codes: NDArray[np.uint8], scales: NDArray[np.float32]) -> Fp8:
    """Do for FP8 what `pack_gate_up_panels` does: codes [..., 2F, K], scales [..., 2F]."""
    width = scales.shape[-1] // 2
    gate = pack_e4m3_panels(codes[..., :width, :], scales[..., :width])
    up = pack_e4m3_panels(codes[..., width:, :], scales[..., width:])
    # scales lack the axis after the panels that the codes have
    return _in_turns(gate[0], up[0]), _in_turns(gate[1][..., None], up[1][..., None])[..., 0]


def _rows(values: NDArray[Values], padding: int) -> NDArray[Values]:
    """[..., N, X] -> [..., P, 16, X]."""
    *leading, count, length = values.shape
    panels = -(-count // PANEL)
    full = np.full((*leading, panels * PANEL, length), padding, values.dtype)
    full[..., :count, :] = values
    return full.reshape(*leading, panels, PANEL, length)


def _in_turns(gate: NDArray[Values], up: NDArray[Values]) -> NDArray[Values]:
    """Twice [..., P, X, Y] -> [..., 2P, X, Y]."""
    *leading, panels, length, width = gate.shape
    return np.stack([gate, up], -3).reshape(*leading, 2 * panels, length, width)
