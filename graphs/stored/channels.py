"""Stores matrices of one byte per weight and a scale per output feature, as the linear functions read them.

E4M3 bytes lie as rows [N, K], integers as columns [K, N]; an expert's matrices likewise, stacked over E.
Legend: N output features, K input features, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from arriero.graphs.stored.rounded import float8
from arriero.graphs.stored.safetensors_writer import Spec
from arriero.graphs.stored.weight_store import WeightStore
from arriero.profiles.quantize import quantize
from arriero.profiles.schemes import Fp8, Int8Dynamic, Int8Static
from arriero.profiles.static_scales import InputScale, guess_inputs, quantize_static
from arriero.profiles.turn import turned

ByteScheme = Fp8 | Int8Dynamic | Int8Static
Arrays = tuple[np.ndarray, ...]


def linear_name(scheme: ByteScheme) -> str:
    """The linear function that multiplies with matrices of `scheme`."""
    if isinstance(scheme, Fp8):
        return "Float8Linear" if scheme.activations == "fp8" else "Float8WeightLinear"
    return "Int8DynamicLinear" if isinstance(scheme, Int8Dynamic) else "Int8StaticLinear"


def store_matrix(store: WeightStore, name: str, scheme: ByteScheme) -> list[ir.Value]:
    """The weight operands of `linear_name(scheme)` for the checkpoint's matrix `name` [N, K]."""

    def pieces() -> Iterator[Arrays]:
        inputs = _inputs(store, name, scheme)
        parts = [_round(store, name, scheme, inputs, start, stop) for start, stop in store.spans(name)]
        # Columns are complete only with the last rows, so the bytes are gathered: a quarter of the matrix in float32.
        packed, scales = (np.concatenate([part[kind] for part in parts]) for kind in (0, 1))
        yield (_lay(packed, scheme), scales, *parts[0][2:])

    return store.promise(_specs(name, scheme, *store.checkpoint.tensors[name].shape), scheme.label, pieces)


def store_experts(store: WeightStore, name: str, scheme: ByteScheme) -> list[ir.Value]:
    """The same for all experts' matrices, which the checkpoint holds as `name` [E, K, N]."""
    experts, features, outputs = store.checkpoint.tensors[name].shape

    def pieces() -> Iterator[Arrays]:
        inputs = _inputs(store, name, scheme)
        for expert in range(experts):
            own = InputScale(inputs.divisors[expert], inputs.largest[expert]) if inputs else None
            packed, *others = _round(store, name, scheme, own, expert, expert + 1)
            yield (_lay(packed, scheme)[None], *(array[None] for array in others))

    return store.promise(_specs(name, scheme, outputs, features, experts), scheme.label, pieces)


def _specs(name: str, scheme: ByteScheme, outputs: int, features: int, *experts: int) -> list[Spec]:
    by_rows = isinstance(scheme, Fp8)
    matrix = (*experts, outputs, features) if by_rows else (*experts, features, outputs)
    specs = [Spec(f"{name}.packed", "F8_E4M3" if by_rows else "U8", matrix)]
    specs.append(Spec(f"{name}.scales", "F32", (*experts, outputs)))
    if isinstance(scheme, Int8Static):
        specs.append(Spec(f"{name}.multiplier", "F32", (*experts, features)))
    return specs


def _inputs(store: WeightStore, name: str, scheme: ByteScheme) -> InputScale | None:
    """What a static scheme takes the inputs of `name` to be; None where each token brings its own scale."""
    if not isinstance(scheme, Int8Static):
        return None
    if scheme.calibrates:
        return store.calibrated(name).read_inputs(name)
    shape = store.checkpoint.tensors[name].shape
    largest = [np.abs(rows).reshape(len(rows), -1).max(-1) for rows in store.rows(name)]
    whole = np.concatenate(largest)
    return guess_inputs(whole[:, None] if len(shape) == 3 else whole.max(keepdims=True), shape[1])


def _round(
    store: WeightStore, name: str, scheme: ByteScheme, inputs: InputScale | None, start: int, stop: int
) -> Arrays:
    """Bytes [n, K], scales [n] and, where inputs are known, their multiplier [K] of rows, or of the expert `start`."""
    stacked = len(store.checkpoint.tensors[name].shape) == 3
    if isinstance(scheme, Fp8):
        floats = float8(store, name, scheme, start, stop)
        return (floats.bits[0], floats.scales[0]) if stacked else (floats.bits, floats.scales)
    checkpoint = store.checkpoint
    rows = checkpoint.read_expert(name, start) if stacked else checkpoint.read_float32(name, start, stop)
    if inputs is None:
        integers = quantize(rows, bits=8, block=rows.shape[1], name=name, scale_type=np.float32)
        return integers.packed, integers.scales[:, 0]
    static = quantize_static(rows, inputs, name=name)
    return static.packed, static.scales, static.multiplier


def _lay(packed: np.ndarray, scheme: ByteScheme) -> np.ndarray:
    """Bytes [N, K] in the order they are stored in."""
    return packed if isinstance(scheme, Fp8) else turned(packed)
