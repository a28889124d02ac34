"""Turns CachedAttention into TensorScatter into fixed-capacity buffers and Attention under an explicit boolean mask.

A token at position p lies in slot p (global) or p % chunk (chunked), and no step crosses a chunk, so a query sees the
slots up to its own. A slot that holds no token of the row must still hold a finite number: the runtime clears buffers
once. Present buffers are outputs that a runtime binds to the pasts' memory: TensorScatter changes what it writes alone.
Legend: B batch, S new tokens, N query heads, K key/value heads, D head size, C buffer capacity in tokens.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from arriero.graphs.functions import CACHED_ATTENTION
from arriero.graphs.rewrite.nodes import add_constant, insert_node, replace_node

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


def scatter_cache(model: ir.Model, dtype: ir.DataType) -> int:
    """Rewrite every CachedAttention, its cache in `dtype`; give how many.

    The pasts become [B, K, C, D] with C `chunk_capacity` or `global_capacity`, the presents of the same shape; the
    positions of past keys leave the signature.
    """
    graph = model.graph
    nodes = [node for node in graph if node.op_type == CACHED_ATTENTION]
    views: dict[int, tuple[ir.Value, ir.Value]] = {}
    for node in nodes:
        chunk = node.attributes["chunk"].as_int()
        heads, kv_heads = (node.attributes[key].as_int() for key in ("num_heads", "kv_heads"))
        q, k, v, past_key, past_value, positions = node.inputs[:6]
        assert past_key is not None
        assert past_key.shape is not None
        size = past_key.shape[3]
        assert isinstance(size, int)
        shape = [past_key.shape[0], kv_heads, f"{'chunk' if chunk else 'global'}_capacity", size]
        for past in (past_key, past_value):
            assert past is not None
            past.shape, past.type = ir.Shape(shape), ir.TensorType(dtype)
        if chunk not in views:  # one mask for all layers of a kind
            assert positions is not None
            views[chunk] = _view(node, positions, past_key, chunk)
        first, seen = views[chunk]
        presents = []
        for new, past, present in ((k, past_key, node.outputs[1]), (v, past_value, node.outputs[2])):
            update = insert_node(node, "Cast", [_heads(node, new, kv_heads, size)], to=int(dtype))
            present.shape, present.type = ir.Shape(shape), ir.TensorType(dtype)
            scatter = ir.node(
                "TensorScatter",
                [past, update, first],
                {"axis": 2, "mode": "linear"},
                outputs=[ir.Value(name=f"{present.name}.written", shape=ir.Shape(shape), type=ir.TensorType(dtype))],
            )
            graph.insert_before(node, scatter)
            presents.append(scatter.outputs[0])
        query = insert_node(node, "Cast", [_heads(node, q, heads, size)], to=int(dtype))
        query.shape, query.type = ir.Shape(["batch", heads, "seq", size]), ir.TensorType(dtype)
        attended = insert_node(node, "Attention", [query, *presents, seen])  # [B, N, S, D]
        rows = insert_node(node, "Transpose", [attended], perm=[0, 2, 1, 3])
        flat = insert_node(node, "Reshape", [rows, add_constant(node, [0, 0, heads * size])])
        for old, made in zip(node.outputs[1:], presents, strict=True):
            _rename(graph, old, made)
        node.resize_outputs(1)
        replace_node(node, "Cast", [flat], {"to": int(FLOAT)}, domain="")
    for name in ("chunk_past_positions", "global_past_positions"):
        graph.inputs.remove(next(value for value in graph.inputs if value.name == name))
    return len(nodes)


def _view(node: ir.Node, positions: ir.Value, past: ir.Value, chunk: int) -> tuple[ir.Value, ir.Value]:
    """Where each row's first new token goes [B], and what each query sees, bool [B, 1, S, C]."""
    slots = positions
    if chunk:
        slots = insert_node(node, "Mod", [positions, add_constant(node, chunk)])
    first = insert_node(node, "Gather", [slots, add_constant(node, 0)], axis=1)
    size = insert_node(node, "Squeeze", [insert_node(node, "Shape", [past], start=2, end=3), add_constant(node, [0])])
    limits = [add_constant(node, ir.tensor(np.array(value, np.int64))) for value in (0, 1)]
    every = insert_node(node, "Range", [limits[0], size, limits[1]])  # [C]
    query = insert_node(node, "Unsqueeze", [slots, add_constant(node, [1, 3])])  # [B, 1, S, 1]
    return first, insert_node(node, "LessOrEqual", [every, query])


def _heads(node: ir.Node, x: ir.Value | None, heads: int, size: int) -> ir.Value:
    """[B, S, heads*D] as [B, heads, S, D]."""
    split = insert_node(node, "Reshape", [x, add_constant(node, [0, 0, heads, size])])
    return insert_node(node, "Transpose", [split], perm=[0, 2, 1, 3])


def _rename(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Put `new` in the place that `old` has among the graph's outputs, under its name."""
    index, name = graph.outputs.index(old), old.name
    old.name = f"{name}.before"
    new.name = name
    graph.outputs[index] = new
