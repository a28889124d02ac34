"""Replaces CachedAttention by com.microsoft GroupQueryAttention over fixed-capacity, in-place key/value buffers.

The positions of past keys leave the signature: a kernel that counts valid keys from slot 0 takes their place. That is
exact as long as the runtime restarts a chunked layer's buffer at each chunk boundary and steps no row across one.
Legend: B batch, S new tokens, K key/value heads, D head size, C buffer capacity in tokens.
"""

from __future__ import annotations

import onnx_ir as ir

from arriero.graphs.functions import CACHED_ATTENTION
from arriero.graphs.rewrite.nodes import replace_node


def replace_attention_with_gqa(model: ir.Model) -> int:
    """Rewrite every CachedAttention node and the graph's cache inputs and outputs; give how many nodes.

    New inputs: `chunk_seqlens_k`, `global_seqlens_k` i32 [B] (valid keys after this step, minus 1), `chunk_total`,
    `global_total` i32 [1] (the most valid keys of any row). Cache inputs and outputs become [B, K, C, D].
    """
    graph = model.graph
    kinds = {kind: _length_inputs(kind) for kind in ("chunk", "global")}
    nodes = [node for node in graph if node.op_type == CACHED_ATTENTION]
    for node in nodes:
        kind = "chunk" if node.attributes["chunk"].as_int() else "global"
        attributes = {
            "num_heads": node.attributes["num_heads"].as_int(),
            "kv_num_heads": node.attributes["kv_heads"].as_int(),
            "do_rotary": 0,
        }
        replace_node(node, "GroupQueryAttention", [*node.inputs[:5], *kinds[kind]], attributes)
        for value in (*node.inputs[3:5], *node.outputs[1:]):
            assert value is not None
            assert value.shape is not None
            value.shape = ir.Shape([value.shape[0], value.shape[1], f"{kind}_capacity", value.shape[3]])
    for name in ("chunk_past_positions", "global_past_positions"):
        graph.inputs.remove(next(value for value in graph.inputs if value.name == name))
    graph.inputs.extend(value for values in kinds.values() for value in values)
    return len(nodes)


def _length_inputs(kind: str) -> tuple[ir.Value, ir.Value]:
    integers = ir.TensorType(ir.DataType.INT32)
    return (
        ir.Value(name=f"{kind}_seqlens_k", shape=ir.Shape(["batch"]), type=integers),
        ir.Value(name=f"{kind}_total", shape=ir.Shape([1]), type=integers),
    )
