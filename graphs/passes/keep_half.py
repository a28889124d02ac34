"""Stores in 16 bits what no product has taken of the tensors that a profile wants so."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import Sequential
from onnx_ir.passes import common as tidy

from arriero.graphs.stored.weight_store import WeightStore
from arriero.profiles.schemes import Half


def keep_half(model: ir.Model, store: WeightStore) -> int:
    """Store what is left of Half tensors (biases, tables, the embedding) in 16 bits, Casts in place; give how many."""
    Sequential(tidy.RemoveUnusedNodesPass())(model)  # what the products have no more use for is not left over
    count = 0
    for name, value in list(model.graph.initializers.items()):
        left = name in store.checkpoint.tensors and name not in store.table and value.uses()
        if left and isinstance(store.schemes[name], Half):
            # under another name, so that no later pass takes it for the checkpoint's own
            half = store.half(name, f"{name}.half")
            for user in value.consumers():
                if user.op_type != "Cast":  # a Gather's rows
                    user.outputs[0].type = half.type
            value.replace_all_uses_with(half)
            count += 1
    return count
