"""Stores each expert as one record: gate_up, its scales, down, its scales, in the layout that our CPU kernels read.

A record begins on a page of its file and fills whole ones, so that it can be mapped, or read past the system's cache in
one go. All records of a layer are laid out alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from arriero.graphs.stored.panels import ExpertMatrix, expert_matrix
from arriero.graphs.stored.safetensors_writer import ALIGNMENT, CACHE_LINE
from arriero.graphs.stored.weight_store import WeightStore


@dataclass(frozen=True)
class RecordLayout:
    """Where in a record the matrices lie, and how large it is.

    `formats` and `blocks` are those of gate_up and down, `at` the offsets of gate_up, its scales, down, its scales (0
    where there are none). `name` tells all of it.
    """

    name: str
    formats: list[str]
    blocks: list[int]
    at: list[int]
    nbytes: int


def store_records(store: WeightStore, gate_up: str, down: str) -> tuple[list[ir.Value], RecordLayout]:
    """The records of the experts in the checkpoint's stacks `gate_up` and `down`, a value each, and their layout."""
    matrices = expert_matrix(store, gate_up, gated=True), expert_matrix(store, down, gated=False)
    layout = _lay_out(matrices)

    halves = zip(matrices, (layout.at[:2], layout.at[2:]), strict=True)
    starts = [start for matrix, half in halves for start in half[: len(matrix.specs)]]

    def pieces(expert: int) -> Iterator[np.ndarray]:
        written = 0
        arrays = (array for matrix in matrices for array in matrix.read(expert))
        for start, array in zip(starts, arrays, strict=True):
            yield np.zeros(start - written, np.uint8)
            yield array
            written = start + array.nbytes
        yield np.zeros(layout.nbytes - written, np.uint8)

    stem = gate_up.rpartition(".")[0]
    experts = store.checkpoint.tensors[down].shape[0]
    held = [(spec, matrix.label) for matrix in matrices for spec in matrix.specs]
    return store.promise_records(stem, experts, layout.nbytes, held, pieces), layout


def _lay_out(matrices: tuple[ExpertMatrix, ExpertMatrix]) -> RecordLayout:
    at, end = [], 0
    for matrix in matrices:
        starts = []
        for spec in matrix.specs:
            starts.append(_aligned(end))
            end = starts[-1] + spec.nbytes
        at += [*starts, 0][:2]
    name = ",".join(_describe(matrix) for matrix in matrices)
    formats, blocks = [matrix.format.name for matrix in matrices], [matrix.format.block for matrix in matrices]
    return RecordLayout(name, formats, blocks, at, -(-end // ALIGNMENT) * ALIGNMENT)


def _describe(matrix: ExpertMatrix) -> str:
    """The layout of one matrix: how its numbers are arranged, their type, and type and grid of the scales."""
    codes = matrix.format.name.removesuffix("_F16")
    if len(matrix.specs) == 1:
        return f"columns:{codes}"
    return f"panels16:{codes}:{matrix.specs[1].dtype}/{matrix.format.block or 'row'}"


def _aligned(offset: int) -> int:
    return -(-offset // CACHE_LINE) * CACHE_LINE
