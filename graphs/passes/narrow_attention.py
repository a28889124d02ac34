"""Lets attention outside the decoder (the vision tower's) run in 16 bits."""

from __future__ import annotations

import onnx_ir as ir

from arriero.graphs.rewrite.nodes import insert_node
from arriero.graphs.rewrite.scheme_products import FLOAT


def narrow_attention(model: ir.Model, dtype: ir.DataType) -> int:
    """Let every Attention over float32 inputs (the vision tower's) compute in `dtype`; give how many."""
    nodes = [node for node in model.graph if node.op_type == "Attention"]
    for node in nodes if dtype != FLOAT else ():
        for index, value in enumerate(node.inputs[:3]):
            node.replace_input_with(index, insert_node(node, "Cast", [value], to=int(dtype)))
        out = node.outputs[0]
        wide = ir.node("Cast", [out], {"to": int(FLOAT)})
        out.replace_all_uses_with(wide.outputs[0])
        wide.replace_input_with(0, out)
        model.graph.insert_after(node, wide)
        out.type = ir.TensorType(dtype)
    return len(nodes)
