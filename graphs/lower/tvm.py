"""Lowers canonical graphs for the TVM backend: one node per kernel of ours, and weights in the layouts these read.

`lower` writes `<part>.onnx` and its weights into `out_dir` and gives the weight table of the manifest: initialiser name
-> file, dtype, shape, scheme. A checkpoint file whose tensors all stay exact is linked, not written again. The
canonical model is left as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.functions import CACHED_ATTENTION, DOMAIN, EXPERT_DISPATCH, VERSION
from arriero.graphs.lower.part import Lowering, WeightTable, expect, lower_part
from arriero.graphs.passes.fold_reshape_shapes import fold_reshape_shapes
from arriero.graphs.passes.fuse_rotary import fuse_rotary
from arriero.graphs.passes.keep_token_axes import keep_token_axes
from arriero.graphs.passes.replace_with_kernels import (
    LOOKUP,
    bind_experts,
    cache_in_place,
    replace_linear_with_kernel,
    replace_lookup,
)
from arriero.graphs.stored.link_file import link_file
from arriero.graphs.stored.weight_store import WeightStore
from arriero.profiles.schemes import Exact, IntBlock, Scheme
from arriero.traits import TRAITS

OPSET = (DOMAIN, VERSION)


def lacks(scheme: Scheme) -> str | None:
    """What of `scheme` our kernels do not compute; None when they do."""
    if isinstance(scheme, IntBlock) and scheme.accuracy_level == 0:
        return f"{scheme.description} beside float32 activations (accuracy_level 0)"
    return None if scheme.kind in TRAITS["tvm"].schemes else scheme.description


def lower(part: str, canonical: ir.Model, given: Lowering) -> WeightTable:
    """Lower one of the parts `text`, `vision` and `embed`. There is no int8 cache here.

    Text has the inputs `inputs_embeds`, `positions`, `logits_index`, `past_key.{i}`, `past_value.{i}` [B, K, C, D],
    into which the step writes its keys and values, and the outputs `logits`, `hidden.{i}`, `expert_id.{i}` [B, S, k].
    One step holds either one row within one chunk, or one token per row. The other parts' signatures stay.
    """
    assert given.cache is None
    text = given.config.text

    def rewrite(model: ir.Model, store: WeightStore) -> None:
        if part == "text":
            expect("RotaryEmbedding", fuse_rotary(model), 2 * sum(layer.rope for layer in text.layers))
            expect(CACHED_ATTENTION, cache_in_place(model), len(text.layers))
            expect(EXPERT_DISPATCH, bind_experts(model, store), len(text.moe_layers))
        if part == "embed":
            expect(LOOKUP, replace_lookup(model, store), 1)
        else:
            replace_linear_with_kernel(model, store)
        if part == "text":
            expect("token Reshape", keep_token_axes(model), 2 * len(text.moe_layers))
        fold_reshape_shapes(model)

    links = _link_checkpoint(given.checkpoint, given.assignment, given.out_dir)
    return lower_part(part, canonical, given, rewrite, OPSET, links)


def _link_checkpoint(checkpoint: Checkpoint, assignment: Mapping[str, Scheme], out_dir: Path) -> dict[Path, str]:
    """Link the checkpoint files of which every tensor stays exact into `weights`; file -> its place in the bundle.

    A file with any tensor that is quantised or not built would carry bytes into the bundle that nothing reads.
    """
    files: dict[Path, bool] = {}
    for info in checkpoint.tensors.values():
        files[info.file] = files.get(info.file, True) and isinstance(assignment.get(info.name), Exact)
    places = {file: f"weights/{file.name}" for file, whole in files.items() if whole}
    for file, place in places.items():
        if not (out_dir / place).exists():  # another part's lowering may have linked it
            link_file(file.resolve(), out_dir / place)
    return places
