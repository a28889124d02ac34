"""What every lowering does around its own rewrites: collect weights, tidy the graph, write both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import Sequential
from onnx_ir.passes import common as tidy

from arriero.errors import ArrieroError
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.config import ModelConfig
from arriero.graphs.passes.keep_weights import keep_weights
from arriero.graphs.passes.widen_weights import widen_weights
from arriero.graphs.rewrite.misses import describe_misses
from arriero.graphs.sources.runtime_adapters import RuntimeAdapters
from arriero.graphs.stored.safetensors_writer import Progress
from arriero.graphs.stored.weight_store import WeightStore
from arriero.profiles.journal import Tell, keep_silent
from arriero.profiles.kv_cache import StoredCache
from arriero.profiles.quantized_weights import QuantizedWeights
from arriero.profiles.schemes import Scheme
from arriero.traits import SHARD

WeightTable = dict[str, dict[str, Any]]
# What is shown the graph of a part after each phase.
Dump = Callable[[str, str, ir.Model], None]


@dataclass(frozen=True)
class Lowering:
    """What the graphs of one target are lowered with, and to where.

    `assignment` is `Profile.assign` over the checkpoint's tensors, `roundings` what calibration found for those that
    round by gptq, `cache` how keys and values are kept. `capability` is that of the target's GPU (89 for 8.9; 0: none,
    or any). `dump` is shown the graph after each phase. `adapters` are those that the bundle switches between; without
    any its graphs have no input for them. No file of weights takes more than `shard` bytes, unless it is
    that of one larger weight. `tell` is given a sentence for what a killed run left and has to be made again.
    """

    config: ModelConfig
    checkpoint: Checkpoint
    assignment: Mapping[str, Scheme]
    out_dir: Path
    progress: Progress | None = None
    roundings: QuantizedWeights | None = None
    cache: StoredCache = field(default_factory=StoredCache)
    capability: int = 0
    dump: Dump | None = None
    adapters: RuntimeAdapters = field(default_factory=RuntimeAdapters)
    shard: int = SHARD
    tell: Tell = keep_silent


@dataclass(frozen=True)
class Phase:
    """One pass of a lowering. `makes`: the kind of node that it turns, of which a config asks for a number."""

    name: str
    run: Callable[[ir.Model, WeightStore], int]
    makes: str | None = None


def lower_part(
    part: str,
    canonical: ir.Model,
    lowering: Lowering,
    phases: Sequence[Phase],
    expected: Mapping[str, int],
    opset: tuple[str, int],
    links: Mapping[Path, str] | None = None,
) -> WeightTable:
    """Write `<part>.onnx`, a clone of `canonical` after all `phases`, and its weights; give the weight table.

    `expected` says how many nodes of each kind the phases must have turned together: raises ArrieroError naming those
    that are left, and why. `opset` is the domain and version of the operators that the phases bring in, `links` as in
    `WeightStore.write`.
    """
    model = canonical.clone()
    model.functions.clear()
    store = WeightStore(model.graph, lowering.checkpoint, lowering.assignment, lowering.roundings)
    dump = lowering.dump or _no_dump
    dump(part, "canonical", model)
    made = dict.fromkeys(expected, 0)
    for phase in phases:
        count = phase.run(model, store)
        if phase.makes is not None:
            made[phase.makes] += count
        dump(part, phase.name, model)
    for kind, count in expected.items():
        if made[kind] != count:
            raise ArrieroError(
                f"{made[kind]} of {count} nodes {kind} were lowered ({describe_misses(model.graph, kind)})",
                where=f"the graph {part}",
                remedy="Report it together with this sentence; --dump-graphs shows the graph after each phase",
            )
    Sequential(tidy.RemoveUnusedNodesPass())(model)
    widen_weights(model, store)
    keep_weights(model, store)
    model.opset_imports[opset[0]] = opset[1]
    passes = (tidy.RemoveUnusedNodesPass(), tidy.TopologicalSortPass(), tidy.RemoveUnusedOpsetsPass())
    Sequential(*passes)(model)
    table = store.write(lowering.out_dir, f"weights/{part}", lowering.shard, lowering.progress, links, lowering.tell)
    ir.save(model, lowering.out_dir / f"{part}.onnx")
    dump(part, "lowered", model)
    return table


def _no_dump(part: str, phase: str, model: ir.Model) -> None:
    """Keep nothing."""
