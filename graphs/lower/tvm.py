"""Lowers canonical graphs for the TVM backend: one node per kernel of ours, and weights in the layouts these read.

`lower` writes `<part>.onnx` and its weights into `out_dir` and gives the weight table of the manifest: initialiser name
-> files, dtype, shape, scheme. A checkpoint file whose tensors all stay as they are is linked, not written again;
experts never do: each becomes one record. The canonical model is left as it was.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from arriero.graphs.functions import ADD_LORA, CACHED_ATTENTION, DOMAIN, EXPERT_DISPATCH, ROUTE_TOKENS, VERSION
from arriero.graphs.lower.part import Lowering, Phase, WeightTable, lower_part
from arriero.graphs.names import expert_tensors
from arriero.graphs.passes.add_adapters import add_adapters
from arriero.graphs.passes.add_forced_routing import add_forced_routing
from arriero.graphs.passes.bind_experts import bind_experts
from arriero.graphs.passes.cache_in_place import ROWS, cache_in_place
from arriero.graphs.passes.fold_reshape_shapes import fold_reshape_shapes
from arriero.graphs.passes.fuse_rotary import ROTARY, fuse_rotary
from arriero.graphs.passes.keep_token_axes import TOKEN_RESHAPE, keep_token_axes
from arriero.graphs.passes.narrow_cache import narrow_cache
from arriero.graphs.passes.replace_linear_with_kernel import replace_linear_with_kernel
from arriero.graphs.passes.replace_lookup import LOOKUP, replace_lookup
from arriero.graphs.stored.link_file import link_file
from arriero.profiles.journal import Journal, Region
from arriero.profiles.schemes import Exact, IntBlock, Scheme
from arriero.traits import TRAITS

OPSET = (DOMAIN, VERSION)


def lacks(scheme: Scheme) -> str | None:
    """What of `scheme` our kernels do not compute; None when they do."""
    if isinstance(scheme, IntBlock) and scheme.accuracy_level == 0:
        return f"{scheme.description} beside float32 activations (accuracy_level 0)"
    return None if scheme.kind in TRAITS["tvm"].schemes else scheme.description


def lower(part: str, canonical: ir.Model, lowering: Lowering) -> WeightTable:
    """Lower one of the parts `text`, `vision` and `embed`.

    Text has the inputs `inputs_embeds` [1, T, H], `positions` [1, T], `logits_index`, `past_key.{i}`, `past_value.{i}`
    [R, K, C, D] of the cache's dtype, into which the step writes its keys and values, `row_starts` i64 [R+1], with
    runtime adapters also `adapter` i64 [R], on MoE layers `forced_expert_id.{i}` i64 [T, k] or [0, k], and the outputs
    `logits`, `hidden.{i}`, `expert_id.{i}` [1, T, k]. The T tokens of a step are those of its rows, one row's after
    another's, each within one chunk; see `cache_in_place`. The other parts' signatures stay.
    """
    text = lowering.config.text
    phases: list[Phase] = []
    expected: dict[str, int] = {}
    if part == "text":
        moe = text.moe_layers
        phases += [
            Phase("fuse_rotary", lambda model, _: fuse_rotary(model), ROTARY),
            Phase("cache_in_place", lambda model, _: cache_in_place(model), CACHED_ATTENTION),
            Phase("narrow_cache", lambda model, _: narrow_cache(model, lowering.cache)),
            Phase("add_forced_routing", lambda model, _: add_forced_routing(model, moe, optional=False), ROUTE_TOKENS),
            Phase("bind_experts", bind_experts, EXPERT_DISPATCH),
        ]
        expected = {
            ROTARY: 2 * sum(layer.rope for layer in text.layers),
            CACHED_ATTENTION: len(text.layers),
            EXPERT_DISPATCH: len(text.moe_layers),
            ROUTE_TOKENS: len(text.moe_layers),
            TOKEN_RESHAPE: 2 * len(text.moe_layers),
        }
        if (adapters := lowering.adapters).names:
            phases.append(
                Phase("add_adapters", lambda model, store: add_adapters(model, store, adapters, ROWS), ADD_LORA)
            )
            expected[ADD_LORA] = len(adapters.deltas)
    if part == "embed":
        phases.append(Phase("replace_lookup", replace_lookup, LOOKUP))
        expected = {LOOKUP: 1}
    else:
        phases.append(Phase("replace_linear_with_kernel", replace_linear_with_kernel))
    if part == "text":
        phases.append(Phase("keep_token_axes", lambda model, _: keep_token_axes(model), TOKEN_RESHAPE))
    phases.append(Phase("fold_reshape_shapes", lambda model, _: fold_reshape_shapes(model)))
    links = _link_checkpoint(lowering)
    return lower_part(part, canonical, lowering, phases, expected, OPSET, links)


def _link_checkpoint(lowering: Lowering) -> dict[Path, str]:
    """Link the checkpoint files of which every tensor stays as it is into `weights`; file -> its place in the bundle.

    A file with any tensor that is quantised, an expert's or not built would carry bytes into the bundle that nothing
    reads.
    """
    experts = {name for layer in lowering.config.text.moe_layers for name in expert_tensors(layer)}
    files: dict[Path, bool] = {}
    for name, source in lowering.checkpoint.tensors.items():
        if source.place is not None:
            file = source.place.file
            stays = isinstance(lowering.assignment.get(name), Exact) and name not in experts
            files[file] = files.get(file, file.stat().st_size <= lowering.shard) and stays
    places = {file: f"weights/{file.name}" for file, whole in files.items() if whole}
    journal = Journal(lowering.out_dir, lowering.tell)
    for file, place in places.items():
        stored, target = file.resolve(), lowering.out_dir / place
        # another part's lowering may have linked it
        if not (target.exists() and target.samefile(stored)) and not journal.holds(place):
            target.unlink(missing_ok=True)
            link_file(stored, target)
            if not target.samefile(stored):
                journal.keep(place, Region.whole(lowering.out_dir, place))
    return places
