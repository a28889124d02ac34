"""Multiplies with checkpoint matrices by standard operators, in the precision that each one's scheme asks for."""

from __future__ import annotations

import onnx_ir as ir

from arriero.graphs.rewrite.linear_weight import TIED, linear_weight
from arriero.graphs.rewrite.nodes import replace_node
from arriero.graphs.rewrite.scheme_products import multiply
from arriero.graphs.stored.weight_store import WeightStore


def multiply_in_scheme(model: ir.Model, store: WeightStore, activations: str) -> int:
    """Rewrite each product with a matrix [N, K] of the checkpoint; give how many. `activations`: F32, F16 or BF16."""
    count = 0
    for node in list(model.graph):
        name = linear_weight(node, store.checkpoint.tensors)
        if name is None:
            continue
        x = node.inputs[0]
        assert x is not None
        out = multiply(node, store, name, x, activations, TIED.get(name))
        replace_node(node, "Identity", [out], {}, domain="")
        count += 1
    return count
