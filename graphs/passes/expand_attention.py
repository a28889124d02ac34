"""Writes Attention out as products and a softmax, for types that a compiler has no fused kernel for (float32).

Legend: B batch, S queries, C keys, N query heads, K key/value heads, G = N / K, D head size.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from arriero.graphs.rewrite.nodes import add_constant, insert_node, replace_node

HIDDEN = np.float32(-1e30)  # finite: where all keys are hidden, infinities would give NaN


def expand_attention(model: ir.Model) -> int:
    """Replace every Attention over q [B, N, S, D], k and v [B, K, C, D], and perhaps a mask bool [B, 1, S, C].

    Every shape but S, C and B must be known. Gives how many were replaced.
    """
    nodes = [node for node in model.graph if node.op_type == "Attention"]
    for node in nodes:
        q, k, v = node.inputs[:3]
        seen = node.inputs[3] if len(node.inputs) > 3 else None
        heads, kv_heads, size = _sizes(q, k)
        query = insert_node(node, "Reshape", [q, add_constant(node, [0, kv_heads, heads // kv_heads, -1, size])])
        scaled = insert_node(node, "Mul", [query, add_constant(node, ir.tensor(np.array(size**-0.5, np.float32)))])
        keys = insert_node(
            node, "Transpose", [insert_node(node, "Unsqueeze", [k, add_constant(node, [2])])], perm=[0, 1, 2, 4, 3]
        )
        scores = insert_node(node, "MatMul", [scaled, keys])  # [B, K, G, S, C]
        if seen is not None:
            mask = insert_node(node, "Unsqueeze", [seen, add_constant(node, [1])])
            scores = insert_node(node, "Where", [mask, scores, add_constant(node, ir.tensor(HIDDEN))])
        shares = insert_node(node, "Softmax", [scores], axis=-1)
        mixed = insert_node(node, "MatMul", [shares, insert_node(node, "Unsqueeze", [v, add_constant(node, [2])])])
        replace_node(node, "Reshape", [mixed, add_constant(node, [0, heads, -1, size])], {}, domain="")
    return len(nodes)


def _sizes(q: ir.Value | None, k: ir.Value | None) -> tuple[int, int, int]:
    """N, K and D."""
    assert q is not None
    assert k is not None
    assert q.shape is not None
    assert k.shape is not None
    heads, size, kv_heads = q.shape[1], q.shape[3], k.shape[1]
    assert isinstance(heads, int)
    assert isinstance(size, int)
    assert isinstance(kv_heads, int)
    return heads, kv_heads, size
