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
from arriero.graphs.stored.rounded import float8, quantized
from arriero.graphs.stored.safetensors_writer import PIECE_BYTES, Spec
from arriero.graphs.stored.weight_store import WeightStore
from arriero.profiles.quantize import Quantized
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
            yield _panels(store, name, scheme, start, stop, gated=False)

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
            packed, scales = _panels(store, name, scheme, expert, expert + 1, gated)
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


def _panels(store: WeightStore, name: str, scheme: IntBlock | Fp8, start: int, stop: int, gated: bool) -> Arrays:
    """Panels and scales of rows of a matrix, or of the one expert `start` of a stack."""
    stacked = len(store.checkpoint.tensors[name].shape) == 3
    if isinstance(scheme, Fp8):
        floats = float8(store, name, scheme, start, stop)
        pack = pack_gate_up_e4m3_panels if gated else pack_e4m3_panels
        return pack(floats.bits[0], floats.scales[0]) if stacked else pack(floats.bits, floats.scales)
    codes = quantized(store, name, scheme, start, stop)
    if stacked:
        codes = Quantized(codes.packed[0], codes.scales[0], codes.bits, codes.block)
    panels = (pack_gate_up_panels if gated else pack_panels)(codes)
    return panels.packed, panels.scales
