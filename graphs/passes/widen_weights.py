"""Stores as f32 what the graph would only widen: norm gains, biases and tables lose their Cast from bf16."""

from __future__ import annotations

import onnx_ir as ir

from arriero.graphs.rewrite.find_weight import find_weight
from arriero.graphs.stored.weight_store import WeightStore


def widen_weights(model: ir.Model, store: WeightStore) -> int:
    """Replace each Cast of a checkpoint tensor by an exact f32 initialiser; give how many."""
    count = 0
    for node in list(model.graph):
        name = find_weight(node.outputs[0], store.checkpoint.tensors) if node.op_type == "Cast" else None
        if name is None or not node.outputs[0].uses():
            continue
        node.outputs[0].replace_all_uses_with(store.exact(name))
        model.graph.remove(node, safe=True)
        count += 1
    return count
