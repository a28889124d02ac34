"""One row per choice of an expert, for kernels that know no scores of Llama 4's: scaled going in, summed coming out.

Legend: T tokens, k experts per token, P = T k pairs, H hidden.
"""

from __future__ import annotations

import onnx_ir as ir

from arriero.graphs.rewrite.nodes import add_constant, insert_node, replace_node


def scale_inputs(node: ir.Node, x: ir.Value | None, score: ir.Value | None, per_token: int, hidden: int) -> ir.Value:
    """Emit the inputs of all pairs [P, H]: each token's, times the score of each of its experts."""
    if per_token == 1:
        return insert_node(node, "Mul", [x, score])
    rows = insert_node(node, "Unsqueeze", [x, add_constant(node, [1])])
    column = insert_node(node, "Unsqueeze", [score, add_constant(node, [2])])
    return insert_node(node, "Reshape", [insert_node(node, "Mul", [rows, column]), add_constant(node, [-1, hidden])])


def sum_choices(node: ir.Node, rows: ir.Value, per_token: int, hidden: int) -> None:
    """Turn `node` into the sum of each token's results: `rows` [P, H] -> [T, H]."""
    grouped = insert_node(node, "Reshape", [rows, add_constant(node, [-1, per_token, hidden])])
    replace_node(node, "ReduceSum", [grouped, add_constant(node, [1])], {"keepdims": 0}, domain="")
