"""Stores matrices as our compiled kernels read them: exact ones byte for byte, integers in panels with their scales.

Legend: N output features, K input features, E experts, P = ceil(N / 16) panels, F expert width.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from arriero.graphs.passes.store_weights import WeightStore
from arriero.graphs.weights import PIECE_BYTES, Spec
from arriero.profiles.panels import PANEL, pack_gate_up_panels, pack_panels
from arriero.profiles.quantize import Quantized, quantize
from arriero.profiles.schemes import IntBlock

Form = list[int]  # bits and block; [0, 0] is exact


def store_matrix(store: WeightStore, name: str, new_name: str | None = None) -> tuple[list[ir.Value], Form]:
    """The operands of a Linear node for the checkpoint's matrix `name` [N, K], and their form."""
    scheme = store.schemes[name]
    if not isinstance(scheme, IntBlock):
        return [store.stored(name, new_name)], [0, 0]
    outputs, features = store.checkpoint.tensors[name].shape
    rows = max(1, PIECE_BYTES // (4 * features * PANEL)) * PANEL

    def pieces() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, outputs, rows):
            stop = min(start + rows, outputs)
            yield _arrays(pack_panels(_rounded(store, name, scheme, start, stop)))

    specs = _specs(name, scheme, -(-outputs // PANEL), features)
    return store.promise(specs, scheme.label, pieces), [scheme.bits, scheme.block]


def store_experts(store: WeightStore, name: str, gated: bool) -> tuple[list[ir.Value], Form]:
    """The same for all experts' matrices, in the checkpoint `name` [E, K, N]; `gated` is for the halves gate | up."""
    scheme = store.schemes[name]
    if not isinstance(scheme, IntBlock):
        return [store.stored(name)], [0, 0]
    experts, features, outputs = store.checkpoint.tensors[name].shape
    panels = 2 * -(-outputs // 2 // PANEL) if gated else -(-outputs // PANEL)
    pack = pack_gate_up_panels if gated else pack_panels

    def pieces() -> Iterator[tuple[np.ndarray, ...]]:
        for expert in range(experts):
            packed, scales = _arrays(pack(_rounded_expert(store, name, scheme, expert)))
            yield packed[None], scales[None]

    specs = _specs(name, scheme, panels, features, experts)
    return store.promise(specs, scheme.label, pieces), [scheme.bits, scheme.block]


def _specs(name: str, scheme: IntBlock, panels: int, features: int, *experts: int) -> list[Spec]:
    return [
        Spec(f"{name}.packed", "U8", (*experts, panels, features * scheme.bits // 32, 4 * PANEL)),
        Spec(f"{name}.scales", "F32", (*experts, panels, features // scheme.block, PANEL)),
    ]


def _rounded(store: WeightStore, name: str, scheme: IntBlock, start: int, stop: int) -> Quantized:
    if scheme.rounding != "nearest":
        found = store.calibrated(name).read(name, scheme.bits, scheme.block)
        return Quantized(found.packed[start:stop], found.scales[start:stop], scheme.bits, scheme.block)
    rows = store.checkpoint.read_float32(name, start, stop)
    return quantize(rows, bits=scheme.bits, block=scheme.block, name=name)


def _rounded_expert(store: WeightStore, name: str, scheme: IntBlock, expert: int) -> Quantized:
    if scheme.rounding != "nearest":
        found = store.calibrated(name).read(name, scheme.bits, scheme.block)
        return Quantized(found.packed[expert], found.scales[expert], scheme.bits, scheme.block)
    rows = np.ascontiguousarray(store.checkpoint.read_float32(name, expert, expert + 1)[0].T)
    return quantize(rows, bits=scheme.bits, block=scheme.block, name=name)


def _arrays(quantized: Quantized) -> tuple[np.ndarray, np.ndarray]:
    return quantized.packed, quantized.scales
