"""Stores matrices as our compiled kernels read them: exact ones byte for byte, rounded ones in panels with scales.

Legend: N output features, K input features, E experts, P = ceil(N / 16) panels, F expert width.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from arriero.graphs.stored.packed_panels import (
    PANEL,
    pack_e4m3_panels,
    pack_gate_up_e4m3_panels,
    pack_gate_up_panels,
    pack_panels,
)
from arriero.graphs.stored.safetensors_writer import PIECE_BYTES, Spec
from arriero.graphs.stored.weight_store import WeightStore
from arriero.profiles.float8 import quantize_float8
from arriero.profiles.quantize import Quantized, quantize
from arriero.profiles.schemes import Fp8, IntBlock

Form = list[int]  # bits and block of integers; [8, 0] is E4M3, [0, 0] exact
Arrays = tuple[np.ndarray, np.ndarray]


def store_matrix(store: WeightStore, name: str, new_name: str | None = None) -> tuple[list[ir.Value], Form]:
    """The operands of a Linear node for the checkpoint's matrix `name` [N, K], and their form."""
    scheme = store.schemes[name]
    if not isinstance(scheme, IntBlock | Fp8):
        return [store.stored(name, new_name)], [0, 0]
    outputs, features = store.checkpoint.tensors[name].shape
    rows = max(1, PIECE_BYTES // (4 * features * PANEL)) * PANEL

    def pieces() -> Iterator[Arrays]:
        for start in range(0, outputs, rows):
            stop = min(start + rows, outputs)
            if isinstance(scheme, IntBlock) and scheme.rounding != "nearest":
                yield _pack(_calibrated(store, name, scheme, slice(start, stop)), gated=False)
            else:
                yield _round(store.checkpoint.read_float32(name, start, stop), scheme, name, gated=False)

    specs = _specs(name, scheme, -(-outputs // PANEL), features)
    return store.promise(specs, scheme.label, pieces), _form(scheme)


def store_experts(store: WeightStore, name: str, gated: bool) -> tuple[list[ir.Value], Form]:
    """The same for all experts' matrices, in the checkpoint `name` [E, K, N]; `gated` is for the halves gate | up."""
    scheme = store.schemes[name]
    if not isinstance(scheme, IntBlock | Fp8):
        return [store.stored(name)], [0, 0]
    experts, features, outputs = store.checkpoint.tensors[name].shape
    panels = 2 * -(-outputs // 2 // PANEL) if gated else -(-outputs // PANEL)

    def pieces() -> Iterator[Arrays]:
        for expert in range(experts):
            if isinstance(scheme, IntBlock) and scheme.rounding != "nearest":
                packed, scales = _pack(_calibrated(store, name, scheme, expert), gated)
            else:
                rows = np.ascontiguousarray(store.checkpoint.read_float32(name, expert, expert + 1)[0].T)
                packed, scales = _round(rows, scheme, name, gated)
            yield packed[None], scales[None]

    return store.promise(_specs(name, scheme, panels, features, experts), scheme.label, pieces), _form(scheme)


def _form(scheme: IntBlock | Fp8) -> Form:
    return [scheme.bits, scheme.block] if isinstance(scheme, IntBlock) else [8, 0]


def _specs(name: str, scheme: IntBlock | Fp8, panels: int, features: int, *experts: int) -> list[Spec]:
    if isinstance(scheme, Fp8):
        codes, factors = (panels, features, PANEL), (panels, PANEL)
        return [Spec(f"{name}.packed", "U8", (*experts, *codes)), Spec(f"{name}.scales", "F32", (*experts, *factors))]
    return [
        Spec(f"{name}.packed", "U8", (*experts, panels, features * scheme.bits // 32, 4 * PANEL)),
        Spec(f"{name}.scales", "F32", (*experts, panels, features // scheme.block, PANEL)),
    ]


def _round(rows: np.ndarray, scheme: IntBlock | Fp8, name: str, gated: bool) -> Arrays:
    """Panels and scales of `rows` f32 [N, K], each value rounded to its nearest."""
    if isinstance(scheme, Fp8):
        floats = quantize_float8(rows, name=name)
        return (pack_gate_up_e4m3_panels if gated else pack_e4m3_panels)(floats.bits, floats.scales)
    return _pack(quantize(rows, bits=scheme.bits, block=scheme.block, name=name), gated)


def _calibrated(store: WeightStore, name: str, scheme: IntBlock, rows: slice | int) -> Quantized:
    """Rows of a matrix, or one expert of a stack, as calibration rounded them."""
    stored = store.calibrated(name).read(name, scheme.bits, scheme.block)
    return Quantized(stored.packed[rows], stored.scales[rows], scheme.bits, scheme.block)


def _pack(quantized: Quantized, gated: bool) -> Arrays:
    panels = (pack_gate_up_panels if gated else pack_panels)(quantized)
    return panels.packed, panels.scales
