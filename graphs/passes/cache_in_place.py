"""Lets attention write into its cache, in place of giving new keys and values back, and rows be of different lengths.

Legend: T new tokens of all rows, R rows of the cache, N heads, K key/value heads, D head size, C buffer capacity in
tokens.
"""

from __future__ import annotations

import onnx_ir as ir

from arriero.graphs.functions import CACHED_ATTENTION

ROWS, ROW_STARTS = "rows", "row_starts"


def cache_in_place(model: ir.Model) -> int:
    """Let every CachedAttention write into its cache inputs [R, K, C, D]; give how many.

    The node is left with out [1, T, N*D] and reads q, k, v, the two buffers, `positions` and the new graph input
    `row_starts` i64 [R+1]: the new tokens of all rows lie one after another, row r's are row_starts[r] to
    row_starts[r + 1]. What else is in the graph works on each token alone. The positions of past keys and the present
    outputs leave the signature: a token at position p lies in slot p (global) or p % chunk, and the runtime steps no
    row across a chunk boundary, so that the slots a query sees are those up to its own.
    """
    graph = model.graph
    starts = ir.Value(name=ROW_STARTS, shape=ir.Shape(["row_edges"]), type=ir.TensorType(ir.DataType.INT64))
    graph.inputs.append(starts)
    nodes = [node for node in graph if node.op_type == CACHED_ATTENTION]
    for node in nodes:
        kind = "chunk" if node.attributes["chunk"].as_int() else "global"
        for value in node.inputs[3:5]:
            assert value is not None
            assert value.shape is not None
            value.shape = ir.Shape([ROWS, value.shape[1], f"{kind}_capacity", value.shape[3]])
        for value in node.outputs[1:]:
            graph.outputs.remove(value)
        node.resize_outputs(1)
        node.replace_input_with(6, starts)
    for name in ("chunk_past_positions", "global_past_positions"):
        graph.inputs.remove(next(value for value in graph.inputs if value.name == name))
    return len(nodes)
