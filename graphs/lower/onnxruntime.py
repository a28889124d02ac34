"""Lowers canonical graphs for ONNX Runtime's CPU kernels: its operators, and weights in the layouts they read.

`lower` writes `<part>.onnx` and `weights/<part>.safetensors` into `out_dir` and gives the weight table of the manifest:
initialiser name -> file, dtype, shape, scheme. The canonical model is left as it was.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from arriero.graphs.functions import ADD_LORA, CACHED_ATTENTION, EXPERT_DISPATCH, ROUTE_TOKENS, add_functions
from arriero.graphs.lower.part import Lowering, Phase, WeightTable, lower_part
from arriero.graphs.names import expert_tensors
from arriero.graphs.passes.add_adapters import add_adapters
from arriero.graphs.passes.add_forced_routing import add_forced_routing
from arriero.graphs.passes.expert_pairs import check_pair
from arriero.graphs.passes.fuse_rotary import ROTARY, fuse_rotary
from arriero.graphs.passes.quantize_cache import INT8_CACHE, quantize_cache
from arriero.graphs.passes.quantize_dispatch import quantize_dispatch
from arriero.graphs.passes.replace_attention_with_gqa import replace_attention_with_gqa
from arriero.graphs.passes.replace_dispatch_with_moe import replace_dispatch_with_moe
from arriero.graphs.passes.replace_linear import replace_linear
from arriero.graphs.rewrite.nodes import CONTRIB
from arriero.profiles.schemes import IntBlock, Scheme
from arriero.traits import TRAITS

OPSET = (CONTRIB, 1)


def lacks(scheme: Scheme) -> str | None:
    """What of `scheme` this backend does not compute; None when it does."""
    # its products know integers alone, and round activations once or not at all
    if isinstance(scheme, IntBlock) and (scheme.grid != "even" or scheme.accuracy_level == 2):
        return scheme.description
    return None if scheme.kind in TRAITS["onnxruntime"].schemes else scheme.description


def check_experts(assignment: Mapping[str, Scheme], layer: int) -> None:
    """Refuse schemes for the experts of `layer` that this backend multiplies with in no single node."""
    gate_up, down = expert_tensors(layer)
    check_pair(assignment[gate_up], assignment[down], down)


def lower(part: str, canonical: ir.Model, lowering: Lowering) -> WeightTable:
    """Lower one of the parts `text`, `vision` and `embed`.

    Text has the inputs `inputs_embeds`, `positions`, `logits_index`, `past_key.{i}`, `past_value.{i}` f32 or i8
    [B, K, C, D], for the chunked and the global layers `{chunk,global}_seqlens_k` i32 [B] and `{chunk,global}_total`
    i32 [1], with runtime adapters `adapter` i64 [B], and on MoE layers `forced_expert_id.{i}` i64 [T, k], which may be
    left out. Its outputs are as in the canonical graph; present buffers are to be bound to the past buffers' memory.
    One step holds either one row within one chunk, or one token per row. The other parts' signatures stay.
    """

    text = lowering.config.text
    if part == "embed":  # only standard operators, and a table in the checkpoint's dtype
        return lower_part(part, canonical, lowering, (), {}, OPSET)
    phases: list[Phase] = []
    expected: dict[str, int] = {}
    if part == "text":
        phases += [
            Phase("fuse_rotary", lambda model, _: fuse_rotary(model), ROTARY),
            Phase("replace_attention_with_gqa", lambda model, _: replace_attention_with_gqa(model), CACHED_ATTENTION),
        ]
        expected = {
            ROTARY: 2 * sum(layer.rope for layer in text.layers),
            CACHED_ATTENTION: len(text.layers),
            EXPERT_DISPATCH: len(text.moe_layers),
            ROUTE_TOKENS: len(text.moe_layers),
        }
        if lowering.cache.dtype == "int8":
            scales = lowering.cache.scales
            phases.append(Phase("quantize_cache", lambda model, _: quantize_cache(model, scales), INT8_CACHE))
            expected[INT8_CACHE] = len(text.layers)
        moe = text.moe_layers
        phases += [
            Phase("add_forced_routing", lambda model, _: add_forced_routing(model, moe, optional=True), ROUTE_TOKENS),
            Phase("quantize_dispatch", quantize_dispatch, EXPERT_DISPATCH),
            Phase("replace_dispatch_with_moe", replace_dispatch_with_moe, EXPERT_DISPATCH),
        ]
        if (adapters := lowering.adapters).names:
            phases.append(Phase("add_adapters", lambda model, store: add_adapters(model, store, adapters), ADD_LORA))
            expected[ADD_LORA] = len(adapters.deltas)
    phases.append(Phase("replace_linear", replace_linear))
    phases.append(Phase("add_functions", lambda model, _: add_functions(model)))
    return lower_part(part, canonical, lowering, phases, expected, OPSET)
