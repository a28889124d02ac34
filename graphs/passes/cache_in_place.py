"""Lets attention write into its cache, in place of giving new keys and values back.

Legend: B batch, S new tokens, N heads, K key/value heads, D head size, C buffer capacity in tokens.
"""

from __future__ import annotations

import onnx_ir as ir

from arriero.graphs.functions import CACHED_ATTENTION


def cache_in_place(model: ir.Model) -> int:
    """Let every CachedAttention write into its cache inputs [B, K, C, D]; give how many.

    The node is left with out [B, S, N*D] and reads q, k, v, the two buffers and `positions`. The positions of past keys
    and the present outputs leave the signature: a token at position p lies in slot p (global) or p % chunk, and the
    runtime steps no row across a chunk boundary, so that the slots a query sees are those up to its own.
    """
    graph = model.graph
    nodes = [node for node in graph if node.op_type == CACHED_ATTENTION]
    for node in nodes:
        kind = "chunk" if node.attributes["chunk"].as_int() else "global"
        for value in node.inputs[3:5]:
            assert value is not None
            assert value.shape is not None
            value.shape = ir.Shape([value.shape[0], value.shape[1], f"{kind}_capacity", value.shape[3]])
        for value in node.outputs[1:]:
            graph.outputs.remove(value)
        node.resize_outputs(1)
        node.resize_inputs(6)
    for name in ("chunk_past_positions", "global_past_positions"):
        graph.inputs.remove(next(value for value in graph.inputs if value.name == name))
    return len(nodes)
