"""Stores matrices as the operands of ONNX's own DequantizeLinear: integers or E4M3 floats in their types, and scales.

A matrix lies as [N, K], a stack of experts as [E, K, N], the orientation that each is multiplied in.
Legend: N output features, K input features, J = K / block, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from arriero.graphs.stored.rounded import quantized
from arriero.graphs.stored.safetensors_writer import PIECE_BYTES, Spec
from arriero.graphs.stored.weight_store import HALVES, WeightStore, narrow
from arriero.profiles.quantize import Quantized
from arriero.profiles.schemes import Int8Static, IntBlock, Static
from arriero.profiles.static_scales import InputScale, guess_inputs, quantize_static, quantize_static_float8
from arriero.profiles.turn import turned

Arrays = tuple[np.ndarray, ...]


def store_blocks(store: WeightStore, name: str, scales: str, new_name: str | None = None) -> list[ir.Value]:
    """Four-bit codes of the matrix or stack `name` and their scales [N, J] or [E, J, N] in the dtype `scales`."""
    scheme = store.schemes[name]
    assert isinstance(scheme, IntBlock)
    shape, stem = store.checkpoint.tensors[name].shape, new_name or name
    stacked = len(shape) == 3
    lengths = (shape[0], shape[1] // scheme.block, shape[2]) if stacked else (shape[0], shape[1] // scheme.block)
    specs = [Spec(f"{stem}.packed", "I4", shape), Spec(f"{stem}.scales", scales, lengths)]

    def pieces() -> Iterator[Arrays]:
        for rounded in rounded_experts(store, name, scheme):
            factors = (
                rounded.scales if scales == "F32" else narrow(rounded.scales, HALVES[scales], name).view(np.uint16)
            )
            if stacked:
                yield _columns(rounded.packed)[None], np.ascontiguousarray(factors.T)[None]
            else:
                yield rounded.packed ^ 0x88, factors

    return store.promise(specs, scheme.label, pieces)


def store_static(store: WeightStore, name: str, new_name: str | None = None) -> list[ir.Value]:
    """Eight-bit codes of the matrix or stack `name`, scales [N] or [E, N], multipliers of inputs [K] or [E, K]."""
    scheme = store.schemes[name]
    assert isinstance(scheme, Static)
    shape, stem = store.checkpoint.tensors[name].shape, new_name or name
    stacked = len(shape) == 3
    outputs, features = (shape[2], shape[1]) if stacked else shape
    experts = shape[:1] if stacked else ()
    codes = "I8" if isinstance(scheme, Int8Static) else "F8_E4M3"
    specs = [
        Spec(f"{stem}.packed", codes, shape),
        Spec(f"{stem}.scales", "F32", (*experts, outputs)),
        Spec(f"{stem}.multiplier", "F32", (*experts, features)),
    ]

    def pieces() -> Iterator[Arrays]:
        if not stacked:
            inputs = _inputs(store, name, scheme)
            parts = [_round(rows, scheme, inputs, name) for rows in store.rows(name)]
            yield (*(np.concatenate([part[kind] for part in parts]) for kind in (0, 1)), parts[0][2])
            return
        for packed, factors, multiplier in static_experts(store, name, scheme):
            yield turned(packed)[None], factors[None], multiplier[None]

    return store.promise(specs, scheme.label, pieces)


def static_experts(store: WeightStore, name: str, scheme: Static) -> Iterator[Arrays]:
    """Codes [N, K], as bytes, scales [N] and multipliers of inputs [K] of each expert of the stack `name`."""
    inputs = _inputs(store, name, scheme)
    for expert in range(store.checkpoint.tensors[name].shape[0]):
        own = InputScale(inputs.divisors[expert], inputs.largest[expert])
        yield _round(store.checkpoint.read_expert(name, expert), scheme, own, name)


def _round(rows: np.ndarray, scheme: Static, inputs: InputScale, name: str) -> Arrays:
    """Codes [n, K], scales [n] and multiplier [K] of `rows` f32 [n, K]."""
    if isinstance(scheme, Int8Static):
        quantized = quantize_static(rows, inputs, name=name)
        return quantized.packed ^ 0x80, quantized.scales, quantized.multiplier  # from offset binary to two's complement
    floats = quantize_static_float8(rows, inputs, name=name)
    return floats.bits, floats.scales, floats.multiplier


def _inputs(store: WeightStore, name: str, scheme: Static) -> InputScale:
    """What the inputs of `name` are taken to be: as calibration saw them, or as large as the weights."""
    if scheme.calibrates:
        return store.calibrated(name).read_inputs(name)
    shape = store.checkpoint.tensors[name].shape
    whole = np.concatenate([np.abs(rows).reshape(len(rows), -1).max(-1) for rows in store.rows(name)])
    return guess_inputs(whole[:, None] if len(shape) == 3 else whole.max(keepdims=True), shape[1])


def rounded_experts(store: WeightStore, name: str, scheme: IntBlock) -> Iterator[Quantized]:
    """Pieces of rows [n, K] of a matrix, or each expert's [N, K], rounded."""
    tensor = store.checkpoint.tensors[name].shape
    if len(tensor) == 2:
        step = max(1, PIECE_BYTES // (4 * tensor[1]))
        for start in range(0, tensor[0], step):
            yield quantized(store, name, scheme, start, min(start + step, tensor[0]))
        return
    for expert in range(tensor[0]):
        codes = quantized(store, name, scheme, expert, expert + 1)
        yield replace(codes, packed=codes.packed[0], scales=codes.scales[0])


def _columns(packed: np.ndarray) -> np.ndarray:
    """Offset-binary nibbles [N, K/2] as two's complement ones [K, N/2], the even element in the low nibble."""
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1).T ^ 8  # [K, N]
    return np.ascontiguousarray(codes[:, 0::2] | (codes[:, 1::2] << 4))
