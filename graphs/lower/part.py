"""What every lowering does around its own rewrites: collect weights, tidy the graph, write both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import Sequential
from onnx_ir.passes import common as tidy

from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.config import ModelConfig
from arriero.graphs.passes.widen_weights import keep_weights, widen_weights
from arriero.graphs.stored.safetensors_writer import Progress
from arriero.graphs.stored.weight_store import WeightStore
from arriero.profiles.kv_cache import CacheScales
from arriero.profiles.quantized_weights import QuantizedWeights
from arriero.profiles.schemes import Scheme

WeightTable = dict[str, dict[str, Any]]
Rewrite = Callable[[ir.Model, WeightStore], object]


@dataclass(frozen=True)
class Lowering:
    """What the graphs of one target are lowered with, and to where.

    `assignment` is `Profile.assign` over the checkpoint's tensors, `roundings` what calibration found for those that
    round by gptq. With `cache`, one entry per layer, keys and values are kept in int8. `capability` is that of the
    target's GPU (89 for 8.9; 0: none, or any).
    """

    config: ModelConfig
    checkpoint: Checkpoint
    assignment: Mapping[str, Scheme]
    out_dir: Path
    progress: Progress | None = None
    roundings: QuantizedWeights | None = None
    cache: Sequence[CacheScales] | None = None
    capability: int = 0


def lower_part(
    part: str,
    canonical: ir.Model,
    given: Lowering,
    rewrite: Rewrite,
    opset: tuple[str, int],
    links: Mapping[Path, str] | None = None,
) -> WeightTable:
    """Write `<part>.onnx`, a clone of `canonical` under `rewrite`, and its weights; give the manifest's weight table.

    `opset` is the domain and version of the operators that `rewrite` brings in, `links` as in `WeightStore.write`.
    """
    model = canonical.clone()
    model.functions.clear()
    store = WeightStore(model.graph, given.checkpoint, given.assignment, given.roundings)
    rewrite(model, store)
    Sequential(tidy.RemoveUnusedNodesPass())(model)
    widen_weights(model, store)
    keep_weights(model, store)
    model.opset_imports[opset[0]] = opset[1]
    passes = (tidy.RemoveUnusedNodesPass(), tidy.TopologicalSortPass(), tidy.RemoveUnusedOpsetsPass())
    Sequential(*passes)(model)
    table = store.write(given.out_dir, f"weights/{part}.safetensors", given.progress, links)
    ir.save(model, given.out_dir / f"{part}.onnx")
    return table


def expect(op_type: str, made: int, wanted: int) -> None:
    """Raise AssertionError unless a pass made as many nodes as the config asks for."""
    if made != wanted:
        raise AssertionError(f"{made} {op_type} nodes were made where the config asks for {wanted}")
