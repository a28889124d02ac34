"""Lowers canonical graphs for ONNX Runtime's CPU kernels: its operators, and weights in the layouts they read.

`lower` writes `<part>.onnx` and `weights/<part>.safetensors` into `out_dir` and gives the weight table of the manifest:
initialiser name -> file, dtype, shape, scheme. The canonical model is left as it was.
"""

from __future__ import annotations

import onnx_ir as ir

from arriero.graphs.functions import add_functions
from arriero.graphs.lower.part import Lowering, WeightTable, expect, lower_part
from arriero.graphs.passes.fuse_rotary import fuse_rotary
from arriero.graphs.passes.quantize_cache import quantize_cache
from arriero.graphs.passes.quantize_dispatch import quantize_dispatch
from arriero.graphs.passes.replace_attention_with_gqa import replace_attention_with_gqa
from arriero.graphs.passes.replace_dispatch_with_moe import replace_dispatch_with_moe
from arriero.graphs.passes.replace_linear import replace_linear
from arriero.graphs.rewrite import CONTRIB
from arriero.graphs.stored.weight_store import WeightStore
from arriero.profiles.schemes import Scheme
from arriero.traits import TRAITS

OPSET = (CONTRIB, 1)


def lacks(scheme: Scheme) -> str | None:
    """What of `scheme` this backend does not compute; None when it does."""
    return None if scheme.kind in TRAITS["onnxruntime"].schemes else scheme.description


def lower(part: str, canonical: ir.Model, given: Lowering) -> WeightTable:
    """Lower one of the parts `text`, `vision` and `embed`.

    Text has the inputs `inputs_embeds`, `positions`, `logits_index`, `past_key.{i}`, `past_value.{i}` f32 or i8
    [B, K, C, D] and, for the chunked and the global layers, `{chunk,global}_seqlens_k` i32 [B] and
    `{chunk,global}_total` i32 [1]. Its outputs are as in the canonical graph; present buffers are to be bound to the
    past buffers' memory. One step holds either one row within one chunk, or one token per row. The other parts'
    signatures stay.
    """

    def rewrite(model: ir.Model, store: WeightStore) -> None:
        if part == "embed":
            return  # only standard operators, and a table in the checkpoint's dtype
        if part == "text":
            text = given.config.text
            expect("RotaryEmbedding", fuse_rotary(model), 2 * sum(layer.rope for layer in text.layers))
            expect("GroupQueryAttention", replace_attention_with_gqa(model), len(text.layers))
            if given.cache is not None:
                expect("int8 cache", quantize_cache(model, given.cache), len(text.layers))
            dispatches = quantize_dispatch(model, store) + replace_dispatch_with_moe(model, store)
            expect("expert dispatch", dispatches, len(text.moe_layers))
        replace_linear(model, store)
        add_functions(model)

    return lower_part(part, canonical, given, rewrite, OPSET)
