"""What every lowering does around its own rewrites: collect weights, tidy the graph, write both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import Sequential
from onnx_ir.passes import common as tidy

from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.passes.store_weights import WeightStore
from arriero.graphs.passes.widen_weights import keep_weights, widen_weights
from arriero.graphs.weights import Progress
from arriero.profiles.roundings import Roundings
from arriero.profiles.schemes import Scheme

WeightTable = dict[str, dict[str, Any]]
Rewrite = Callable[[ir.Model, WeightStore], object]


def lower_part(
    part: str,
    canonical: ir.Model,
    rewrite: Rewrite,
    opset: tuple[str, int],
    checkpoint: Checkpoint,
    assignment: Mapping[str, Scheme],
    out_dir: Path,
    progress: Progress | None,
    roundings: Roundings | None,
    links: Mapping[Path, str] | None = None,
) -> WeightTable:
    """Write `<part>.onnx`, a clone of `canonical` under `rewrite`, and its weights; give the manifest's weight table.

    `opset` is the domain and version of the operators that `rewrite` brings in, `links` as in `WeightStore.write`.
    """
    model = canonical.clone()
    model.functions.clear()
    store = WeightStore(model.graph, checkpoint, assignment, roundings)
    rewrite(model, store)
    Sequential(tidy.RemoveUnusedNodesPass())(model)
    widen_weights(model, store)
    keep_weights(model, store)
    model.opset_imports[opset[0]] = opset[1]
    passes = (tidy.RemoveUnusedNodesPass(), tidy.TopologicalSortPass(), tidy.RemoveUnusedOpsetsPass())
    Sequential(*passes)(model)
    table = store.write(out_dir, f"weights/{part}.safetensors", progress, links)
    ir.save(model, out_dir / f"{part}.onnx")
    return table


def expect(op_type: str, made: int, wanted: int) -> None:
    """Raise AssertionError unless a pass made as many nodes as the config asks for."""
    if made != wanted:
        raise AssertionError(f"{made} {op_type} nodes were made where the config asks for {wanted}")
