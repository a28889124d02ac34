"""Turns ExpertDispatch into the dispatch over eight-bit products that its experts' scheme asks for: one node each."""

from __future__ import annotations

import onnx_ir as ir

from arriero.graphs.dispatch_functions import dispatch_over
from arriero.graphs.functions import DOMAIN, EXPERT_DISPATCH
from arriero.graphs.passes.expert_pairs import check_pair
from arriero.graphs.rewrite.misses import miss
from arriero.graphs.rewrite.nodes import replace_node
from arriero.graphs.stored.channels import ByteScheme, linear_name, store_experts
from arriero.graphs.stored.weight_store import WeightStore


def quantize_dispatch(model: ir.Model, store: WeightStore) -> int:
    """Rewrite every ExpertDispatch node whose experts hold one byte per weight; give how many.

    Raises ArrieroError where a layer's two stacks of experts have schemes that no single function multiplies with.
    """
    count = 0
    for node in list(model.graph):
        if node.op_type != EXPERT_DISPATCH:
            continue
        names = [str(value.name) for value in node.inputs[3:5] if value is not None]
        first, second = (store.schemes[name] for name in names)
        if not isinstance(first, ByteScheme):
            miss(node, EXPERT_DISPATCH, f"{names[0]} is {first.description}, not one byte per weight")
            continue
        check_pair(first, second, names[1])
        assert isinstance(second, ByteScheme)
        weights = [*store_experts(store, names[0], first), *store_experts(store, names[1], second)]
        replace_node(node, dispatch_over(linear_name(first)), [*node.inputs[:3], *weights], {}, DOMAIN)
        count += 1
    return count
