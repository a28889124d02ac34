"""Collects the weights a lowered graph asks for, in the layouts its kernels read, and writes them in one stream.

Legend: N output features, K input features, J = K / block, E experts, H hidden, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from arriero.errors import ArrieroError
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.sources.weight_source import WeightSource
from arriero.graphs.stored import safetensors_writer as weights
from arriero.graphs.stored.safetensors_writer import Group, Progress, Spec
from arriero.profiles.journal import Tell, keep_silent
from arriero.profiles.quantized_weights import QuantizedWeights
from arriero.profiles.schemes import Exact, Half, Scheme

DTYPES = {
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "U8": ir.DataType.UINT8,
    "I8": ir.DataType.INT8,
    "I32": ir.DataType.INT32,
    "I4": ir.DataType.INT4,
    "F8_E4M3": ir.DataType.FLOAT8E4M3FN,
}
HALVES: dict[str, np.dtype[Any]] = {"F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
Rows = Callable[[], Iterable[np.ndarray]]


class WeightStore:
    """New initialisers of `graph`, promised now, written by `write`; `schemes` says how each tensor is stored.

    Tensors whose scheme rounds by calibration are taken from `roundings`.
    """

    def __init__(
        self,
        graph: ir.Graph,
        checkpoint: Checkpoint,
        schemes: Mapping[str, Scheme],
        roundings: QuantizedWeights | None = None,
    ) -> None:
        self.graph, self.checkpoint, self.schemes, self.roundings = graph, checkpoint, schemes, roundings
        self.table: dict[str, dict[str, Any]] = {}
        self._groups: list[Group] = []
        self._records: list[Group] = []
        self._held: dict[str, list[str]] = {}  # of the weight table's entries, the initialisers that hold them
        self._origins: dict[str, WeightSource] = {}

    def exact(self, name: str, new_name: str | None = None) -> ir.Value:
        """Tensor `name` as f32, in the checkpoint's layout. Raises ArrieroError if the profile wants it quantised."""
        self.refuse_quantized(name)
        return self.exact_rows(new_name or name, self.checkpoint.tensors[name].shape, lambda: self.rows(name))

    def stored(self, name: str, new_name: str | None = None) -> ir.Value:
        """Tensor `name` byte for byte, in the checkpoint's dtype and layout. Raises as `exact` does."""
        self.refuse_quantized(name)
        info = self.checkpoint.tensors[name]
        self._origins[new_name or name] = info

        def pieces() -> Iterator[tuple[np.ndarray]]:
            for start, stop in self.spans(name):
                yield (self.checkpoint.read_rows(name, start, stop),)

        return self.promise([Spec(new_name or name, info.dtype, info.shape)], "exact", pieces)[0]

    def half(self, name: str, new_name: str | None = None) -> ir.Value:
        """Tensor `name`, whose scheme is Half, in that format and the checkpoint's layout.

        Raises ArrieroError for a value that the format has no finite number for.
        """
        scheme = self.schemes[name]
        assert isinstance(scheme, Half)
        info, label, stem = self.checkpoint.tensors[name], scheme.label.upper(), new_name or name
        if info.dtype == label:
            self._origins[stem] = info
        dtype = HALVES[label]

        def pieces() -> Iterator[tuple[np.ndarray]]:
            if info.dtype == label:
                yield from ((self.checkpoint.read_rows(name, start, stop),) for start, stop in self.spans(name))
                return
            for rows in self.rows(name):
                yield (narrow(rows, dtype, name).view(np.uint16),)

        return self.promise([Spec(stem, label, info.shape)], scheme.label, pieces)[0]

    def exact_rows(self, new_name: str, shape: tuple[int, ...], rows: Rows) -> ir.Value:
        """An f32 initialiser `new_name` of `shape`, made of `rows()`."""
        return self.promise([Spec(new_name, "F32", shape)], "exact", lambda: ((piece,) for piece in rows()))[0]

    def write(
        self,
        folder: Path,
        stem: str,
        shard: int,
        progress: Progress | None = None,
        links: Mapping[Path, str] | None = None,
        tell: Tell = keep_silent,
    ) -> dict[str, dict[str, Any]]:
        """Write everything promised, bind the initialisers to it, and give the weight table.

        It goes to `folder/<stem>-<number>.safetensors`, records to `<stem>-experts-<number>.safetensors`, none of more
        than `shard` bytes but those of one weight that is larger. A tensor kept byte for byte whose checkpoint file is
        in `links` is bound to the location given there instead. `progress` and `tell` as in `write_all`.
        """
        places = {
            name: (links[place.file], place.offset)
            for name, source in self._origins.items()
            if links is not None and (place := source.place) is not None and place.file in links
        }
        own = [group for group in self._groups if group.specs[0].name not in places]
        files = {
            f"{prefix}-{number:05}.safetensors": groups
            for prefix, promised in ((stem, own), (f"{stem}-experts", self._records))
            for number, groups in enumerate(weights.split(promised, shard), 1)
        }
        for location, layout in weights.write_all(folder, files, progress, tell).items():
            places |= {name: (location, offset) for name, offset in layout.offsets.items()}
        for group in (*self._groups, *self._records):
            for spec in group.specs:
                file, offset = places[spec.name]
                self.graph.initializers[spec.name].const_value = ir.ExternalTensor(
                    location=file,
                    offset=offset,
                    length=spec.nbytes,
                    dtype=DTYPES[spec.dtype],
                    shape=ir.Shape(spec.shape),
                    name=spec.name,
                    base_dir=folder,
                )
        for name, entry in self.table.items():
            entry["files"] = sorted({places[held][0] for held in self._held[name]})
        return self.table

    def refuse_quantized(self, name: str) -> None:
        """Raise ArrieroError if the profile wants tensor `name` quantised."""
        scheme = self.schemes[name]
        if not isinstance(scheme, Exact):
            raise ArrieroError(
                f"the profile stores it as {scheme.dtype}, and no kernel of the backend reads it so",
                where=name,
                expected="a matrix of attention, an MLP or the experts",
                remedy="Put it under `keep` in the profile",
            )

    def promise(
        self, specs: list[Spec], scheme: str, pieces: Callable[[], Iterable[tuple[np.ndarray, ...]]]
    ) -> list[ir.Value]:
        """Initialisers for `specs`, which `pieces()` will fill (see `Group`); `scheme` is the weight table's label."""
        if specs[0].name in self.table:  # a second consumer of the same weight
            return [self.graph.initializers[spec.name] for spec in specs]
        values = []
        for spec in specs:
            old = self.graph.initializers.pop(spec.name, None)
            value = ir.Value(name=spec.name, shape=ir.Shape(spec.shape), type=ir.TensorType(DTYPES[spec.dtype]))
            if old is not None:
                old.replace_all_uses_with(value)
            self.graph.initializers[spec.name] = value
            self._enter(spec.name, spec.dtype, spec.shape, scheme, [spec.name])
            values.append(value)
        self._groups.append(Group(tuple(specs), pieces))
        return values

    def promise_records(
        self,
        stem: str,
        experts: int,
        nbytes: int,
        held: Iterable[tuple[Spec, str]],
        pieces: Callable[[int], Iterable[np.ndarray]],
    ) -> list[ir.Value]:
        """Initialisers u8 [nbytes] `<stem>.<expert>`, which `pieces(expert)` will fill from front to back.

        `held` are what one of them holds, each with its label: the weight table has them as stacks over all experts.
        """
        values = [
            ir.Value(name=f"{stem}.{expert}", shape=ir.Shape([nbytes]), type=ir.TensorType(ir.DataType.UINT8))
            for expert in range(experts)
        ]
        for expert, value in enumerate(values):
            spec = Spec(str(value.name), "U8", (nbytes,))
            self.graph.initializers[spec.name] = value
            self._records.append(Group((spec,), lambda expert=expert: ((piece,) for piece in pieces(expert))))  # type: ignore[misc]
        for spec, scheme in held:
            self._enter(spec.name, spec.dtype, (experts, *spec.shape), scheme, [str(value.name) for value in values])
        return values

    def _enter(self, name: str, dtype: str, shape: tuple[int, ...], scheme: str, held: list[str]) -> None:
        self.table[name] = {"dtype": dtype, "shape": list(shape), "scheme": scheme}
        self._held[name] = held

    def calibrated(self, name: str) -> QuantizedWeights:
        """The roundings, which hold tensor `name`. Raises ArrieroError if they do not."""
        if self.roundings is None or name not in self.roundings:
            raise ArrieroError("calibration gave no rounding for this tensor", where=name, remedy="Build it again")
        return self.roundings

    def rows(self, name: str) -> Iterator[np.ndarray]:
        """Tensor `name` in float32 pieces along its first axis."""
        for start, stop in self.spans(name):
            yield self.checkpoint.read_float32(name, start, stop)

    def spans(self, name: str) -> Iterator[tuple[int, int]]:
        """Ranges of rows of tensor `name`, each a piece to read and write."""
        shape = self.checkpoint.tensors[name].shape
        yield from weights.row_slices(shape[0], 4 * int(np.prod(shape[1:], dtype=np.int64)))


def narrow(values: np.ndarray, dtype: np.dtype[Any], name: str) -> np.ndarray:
    """`values` f32 rounded to `dtype`. Raises ArrieroError naming the tensor when one becomes infinite."""
    with np.errstate(over="ignore"):
        narrowed = values.astype(dtype)
    lost = int(np.count_nonzero(~np.isfinite(narrowed.astype(np.float32))))
    if lost:
        raise ArrieroError(
            f"{lost} of {values.size} values are beyond what {dtype.name} holds",
            where=name,
            remedy="Take a profile in bfloat16, or put it under `keep`",
        )
    return narrowed
