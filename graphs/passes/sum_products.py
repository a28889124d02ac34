"""Writes float32 matrix products as elementwise products and their sums, for GPUs that have no others."""

from __future__ import annotations

import onnx_ir as ir

from arriero.graphs.rewrite.nodes import add_constant, insert_node, replace_node
from arriero.graphs.rewrite.scheme_products import FLOAT


def sum_products(model: ir.Model) -> int:
    """Write each float32 MatMul with a turned matrix [N, K] as products and their sums; give how many.

    For GPUs without float32 matrix products, where what is left of them (the router) is small.
    """
    count = 0
    for node in list(model.graph):
        turned = node.inputs[1].producer() if node.op_type == "MatMul" and node.inputs[1] is not None else None
        if turned is None or turned.op_type != "Transpose" or turned.inputs[0] is None:
            continue
        weight = turned.inputs[0]
        if not weight.is_initializer() or weight.dtype != FLOAT:
            continue
        rows = insert_node(node, "Unsqueeze", [node.inputs[0], add_constant(node, [-2])])  # [.., 1, K]
        replace_node(
            node,
            "ReduceSum",
            [insert_node(node, "Mul", [rows, weight]), add_constant(node, [-1])],
            {"keepdims": 0},
            domain="",
        )
        count += 1
    return count
