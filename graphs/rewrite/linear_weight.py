"""Finds the products of a graph with matrices of the checkpoint."""

from __future__ import annotations

from collections.abc import Container

import onnx_ir as ir

from arriero.graphs.names import EMBEDDING, HEAD
from arriero.graphs.rewrite.find_weight import find_weight

# With tied embeddings the head gets a name of its own: the embedding graph stores the table under its name, as it is.
TIED = {EMBEDDING: HEAD}


def linear_weight(node: ir.Node, names: Container[str]) -> str | None:
    """The matrix [N, K], one of `names`, of a bias-free linear layer; None for any other node."""
    if node.op_type == "MatMul":
        transpose = node.inputs[1].producer() if node.inputs[1] is not None else None
        if transpose is None or transpose.op_type != "Transpose":
            return None
        return find_weight(transpose.inputs[0], names)
    if node.op_type == "Gemm" and len(node.inputs) == 2 and node.attributes.get_int("transB", 0) == 1:
        return find_weight(node.inputs[1], names)
    return None
