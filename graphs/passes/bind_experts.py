"""Gives expert dispatch its weights as the compiled kernels read them: exact ones byte for byte, integers in panels.

Legend: F expert width.
"""

from __future__ import annotations

import onnx_ir as ir

from arriero.graphs.functions import DOMAIN, EXPERT_DISPATCH
from arriero.graphs.rewrite.nodes import replace_node
from arriero.graphs.stored.panels import store_experts
from arriero.graphs.stored.weight_store import WeightStore


def bind_experts(model: ir.Model, store: WeightStore) -> int:
    """Give every ExpertDispatch its weights; give how many.

    Inputs: x, expert_id, score, gate_up (and its scales), down (and its scales). Attributes: `forms`, bits and block of
    both (block 0: E4M3, bits 0: exact), and `width`, F.
    """
    nodes = [node for node in model.graph if node.op_type == EXPERT_DISPATCH]
    for node in nodes:
        gate_up, down = (str(value.name) for value in node.inputs[3:5] if value is not None)
        first, first_form = store_experts(store, gate_up, gated=True)
        second, second_form = store_experts(store, down, gated=False)
        attributes = {"forms": [*first_form, *second_form], "width": store.checkpoint.tensors[down].shape[1]}
        replace_node(node, EXPERT_DISPATCH, [*node.inputs[:3], *first, *second], attributes, DOMAIN)
    return len(nodes)
