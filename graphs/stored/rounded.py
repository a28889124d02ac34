"""A tensor's integers or E4M3 floats with their scales, wherever its scheme says that they come from.

Case 1, stored: the checkpoint's own codes. Case 2, gptq: what calibration rounded. Case 3, nearest: rounded now.
Legend: n rows or experts, N output features, K input features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from arriero.errors import ArrieroError
from arriero.graphs.sources.safetensors_header import to_float32
from arriero.graphs.sources.stored_codes import Codes
from arriero.graphs.stored.safetensors_writer import Spec
from arriero.graphs.stored.weight_store import WeightStore
from arriero.profiles.float8 import Float8, quantize_float8
from arriero.profiles.piecewise import in_pieces
from arriero.profiles.quantize import SLICE_BYTES, Quantized, check_block
from arriero.profiles.schemes import Fp8, IntBlock
from arriero.profiles.stored_values import nearest
from arriero.profiles.turn import turned

GROUP = 8  # slices whose rows are turned together: of too few columns at a time that is slow
Rounded = TypeVar("Rounded")


def quantized(store: WeightStore, name: str, scheme: IntBlock, start: int, stop: int) -> Quantized:
    """Rows `start` to `stop` of the matrix `name` [n, K], or experts of a stack [n, N, K], in integers."""
    if scheme.rounding == "stored":  # case 1
        codes = _stored(store, name, (scheme.bits, scheme.block), start, stop)
        assert isinstance(codes, Quantized)
        return codes
    if scheme.rounding == "gptq":  # case 2
        return store.calibrated(name).read(name, scheme, start, stop)
    parts = _in_slices(store, name, start, stop, lambda rows: nearest(rows, scheme, name=name))  # case 3
    axis = _outputs_axis(store, name)
    packed, scales = _joined([part.packed for part in parts], axis), _joined([part.scales for part in parts], axis)
    return replace(parts[0], packed=packed, scales=scales)


def float8(store: WeightStore, name: str, scheme: Fp8, start: int, stop: int) -> Float8:
    """The same in E4M3."""
    if scheme.rounding == "stored":  # case 1
        codes = _stored(store, name, (8, 0), start, stop)
        assert isinstance(codes, Float8)
        return codes
    parts = _in_slices(store, name, start, stop, lambda rows: quantize_float8(rows, name=name))  # case 3
    axis = _outputs_axis(store, name)
    return Float8(_joined([part.bits for part in parts], axis), _joined([part.scales for part in parts], axis))


def store_rows(
    store: WeightStore,
    name: str,
    scheme: IntBlock,
    packed_shape: tuple[int, ...],
    order: np.ndarray | None = None,
) -> tuple[ir.Value, ir.Value]:
    """Initialisers `name.packed` u8 `packed_shape` and `name.scales` f32 [..., N, K / block] of a matrix or stack.

    `order` [N] is the order of output features in which an expert's rows are stored.
    """
    shape = store.checkpoint.tensors[name].shape
    stacked = len(shape) == 3
    features = shape[1]
    check_block(features, scheme.block, name)

    def pieces() -> Iterator[tuple[np.ndarray, ...]]:
        spans = ((expert, expert + 1) for expert in range(shape[0])) if stacked else store.spans(name)
        for start, stop in spans:
            codes = quantized(store, name, scheme, start, stop)
            yield (codes.packed, codes.scales) if order is None else (codes.packed[:, order], codes.scales[:, order])

    outputs = (shape[0], shape[2]) if stacked else shape[:1]
    specs = [
        Spec(f"{name}.packed", "U8", packed_shape),
        Spec(f"{name}.scales", "F32", (*outputs, features // scheme.block)),
    ]
    packed, scales = store.promise(specs, scheme.label, pieces)
    return packed, scales


def _stored(store: WeightStore, name: str, form: tuple[int, int], start: int, stop: int) -> Codes:
    codes = store.checkpoint.tensors[name].codes
    if codes is None or codes.form != form:
        raise ArrieroError(
            "the checkpoint does not store it in the form that the profile keeps",
            where=name,
            remedy="Give it another `rounding` in the profile",
        )
    return codes.read(start, stop)


def _in_slices(
    store: WeightStore, name: str, start: int, stop: int, work: Callable[[np.ndarray], Rounded]
) -> list[Rounded]:
    """What `work` makes of some rows f32 [n, K] of a matrix at a time, or of experts' turned [n, N, K] some of the N.

    Slices stay in a processor's own cache while they are gone over. Each thread turns `GROUP` of them at a time.
    """
    source = store.checkpoint.tensors[name]
    stored = source.rows(start, stop)
    axis = stored.ndim - 1 if stored.ndim == 3 else 0
    outputs = stored.shape[axis]
    at_once = max(1, SLICE_BYTES * outputs // (4 * stored.size))

    def round_group(group: slice) -> list[Rounded]:
        rows = turned(stored[..., group]) if stored.ndim == 3 else stored[group]
        slices = (np.s_[..., at : at + at_once, :] for at in range(0, rows.shape[-2], at_once))
        return [work(to_float32(rows[one], source.dtype)) for one in slices]

    return [part for parts in in_pieces(round_group, outputs, GROUP * at_once) for part in parts]


def _outputs_axis(store: WeightStore, name: str) -> int:
    """Which axis of what is rounded has the output features: [N, ..], or of experts [n, N, ..]."""
    return len(store.checkpoint.tensors[name].shape) - 2


def _joined(parts: list[np.ndarray], axis: int) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis)
