"""Stores matrices as our compiled kernels read them: exact ones byte for byte, rounded ones in panels with scales.

Legend: N output features, K input features, P = ceil(N / 16) panels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from arriero.graphs.sources.stored_codes import scale_type
from arriero.graphs.stored.packed_panels import (
    PANEL,
    STEPS,
    pack_e4m3_panels,
    pack_gate_up_e4m3_panels,
    pack_gate_up_panels,
    pack_panels,
)
from arriero.graphs.stored.rounded import float8, quantized
from arriero.graphs.stored.safetensors_writer import PIECE_BYTES, Spec
from arriero.graphs.stored.weight_store import WeightStore
from arriero.profiles.piecewise import in_pieces
from arriero.profiles.quantize import Quantized
from arriero.profiles.schemes import Fp8, IntBlock

Arrays = tuple[np.ndarray, np.ndarray]
GROUP_NUMBERS = 1 << 19  # that one thread packs at a time: they stay in a processor's own cache
EXACT = "exact"  # the format of a matrix that stays what it is


@dataclass(frozen=True)
class Format:
    """How a matrix is stored: `name` exact, E4M3, INT8, INT4 or GRID4 to GRID2, which have a `block` each.

    `_F16` is added to the latter where their scales are in float16.
    """

    name: str
    block: int = 0


def store_matrix(store: WeightStore, name: str, new_name: str | None = None) -> tuple[list[ir.Value], Format]:
    """The operands of a Linear node for the checkpoint's matrix `name` [N, K], and their format."""
    scheme = store.schemes[name]
    if not isinstance(scheme, IntBlock | Fp8):
        return [store.stored(name, new_name)], Format(EXACT)
    outputs, features = store.checkpoint.tensors[name].shape
    rows = max(1, PIECE_BYTES // (4 * features * PANEL)) * PANEL

    def pieces() -> Iterator[Arrays]:
        for start in range(0, outputs, rows):
            stop = min(start + rows, outputs)
            yield _panels(store, name, scheme, start, stop, gated=False)

    specs = _specs(store, name, scheme, -(-outputs // PANEL))
    return store.promise(specs, scheme.label, pieces), _format(scheme, specs)


@dataclass(frozen=True)
class ExpertMatrix:
    """One matrix of each expert of a layer: its arrays, all of one shape, and `read(expert)`, which gives them.

    `label` is the scheme's in the weight table; an exact `format` is named by its dtype, F32, BF16 or F16.
    """

    specs: tuple[Spec, ...]
    label: str
    format: Format
    read: Callable[[int], tuple[np.ndarray, ...]]


def expert_matrix(store: WeightStore, name: str, gated: bool) -> ExpertMatrix:
    """That of the checkpoint's stack `name` [E, K, N]; `gated` is for the halves gate | up."""
    scheme, info = store.schemes[name], store.checkpoint.tensors[name]
    _, features, outputs = info.shape
    if not isinstance(scheme, IntBlock | Fp8):
        store.refuse_quantized(name)
        spec = Spec(name, info.dtype, (features, outputs))
        rows = store.checkpoint.read_rows
        return ExpertMatrix((spec,), "exact", Format(info.dtype), lambda expert: (rows(name, expert, expert + 1),))
    panels = 2 * -(-outputs // 2 // PANEL) if gated else -(-outputs // PANEL)

    def read(expert: int) -> Arrays:
        return _panels(store, name, scheme, expert, expert + 1, gated)

    specs = tuple(_specs(store, name, scheme, panels))
    return ExpertMatrix(specs, scheme.label, _format(scheme, specs), read)


def _format(scheme: IntBlock | Fp8, specs: Sequence[Spec]) -> Format:
    if isinstance(scheme, Fp8):
        return Format("E4M3")
    codes = f"INT{scheme.bits}" if scheme.grid == "even" else f"GRID{scheme.bits}"
    return Format(codes + ("_F16" if specs[1].dtype == "F16" else ""), scheme.block)


def _specs(store: WeightStore, name: str, scheme: IntBlock | Fp8, panels: int) -> list[Spec]:
    info = store.checkpoint.tensors[name]
    features = info.shape[1]
    if isinstance(scheme, Fp8):
        codes, factors = (panels, features, PANEL), (panels, PANEL)
        return [Spec(f"{name}.packed", "U8", codes), Spec(f"{name}.scales", "F32", factors)]
    step = STEPS[scheme.bits]
    return [
        Spec(f"{name}.packed", "U8", (panels, features // step, 2 * scheme.bits * step)),
        Spec(f"{name}.scales", scale_type(info.codes, scheme), (panels, features // scheme.block, PANEL)),
    ]


def _panels(store: WeightStore, name: str, scheme: IntBlock | Fp8, start: int, stop: int, gated: bool) -> Arrays:
    """Panels and scales of rows of a matrix, or of the one expert `start` of a stack."""
    info = store.checkpoint.tensors[name]
    stacked = len(info.shape) == 3
    if isinstance(scheme, Fp8):
        floats = float8(store, name, scheme, start, stop)
        pack = pack_gate_up_e4m3_panels if gated else pack_e4m3_panels
        return pack(floats.bits[0], floats.scales[0]) if stacked else pack(floats.bits, floats.scales)
    codes = quantized(store, name, scheme, start, stop)
    if stacked:
        codes = replace(codes, packed=codes.packed[0], scales=codes.scales[0])
    panels = in_groups(codes, gated)
    narrow = np.float32 if scale_type(info.codes, scheme) == "F32" else np.float16
    return panels.packed, panels.scales.astype(narrow, copy=False)


def in_groups(codes: Quantized, gated: bool) -> Quantized:
    """What the packers of `packed_panels` make of rows [N, K], several groups of them at a time."""
    halves = 2 if gated else 1
    width, features = len(codes.packed) // halves, codes.packed.shape[1] * 8 // codes.bits
    rows = max(1, GROUP_NUMBERS // (halves * features * PANEL)) * PANEL
    pack = pack_gate_up_panels if gated else pack_panels

    def pack_group(group: slice) -> Quantized:
        packed, scales = (_of_each_half(values, halves, group) for values in (codes.packed, codes.scales))
        return pack(replace(codes, packed=packed, scales=scales))

    groups = in_pieces(pack_group, width, rows)
    packed, scales = (np.concatenate([one.packed for one in groups]), np.concatenate([one.scales for one in groups]))
    return replace(codes, packed=packed, scales=scales)


def _of_each_half(values: np.ndarray, halves: int, rows: slice) -> np.ndarray:
    """These rows of each half of [N, X], one half behind the other."""
    return values.reshape(halves, -1, values.shape[-1])[:, rows].reshape(-1, values.shape[-1])
