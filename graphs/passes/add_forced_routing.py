"""Lets a caller of the graph say which experts a token goes to, in the place of its routers' choice.

A proof tells by this how much of a difference comes from values and how much from tokens that went elsewhere.
Legend: T tokens, E experts, k experts per token, F forced tokens: T, or fewer where nothing is forced.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from arriero.graphs.functions import DOMAIN, EXPERT_DISPATCH, ROUTE_TOKENS
from arriero.graphs.rewrite.nodes import replace_node

INPUT = "forced_expert_id"


def add_forced_routing(model: ir.Model, layers: tuple[int, ...], optional: bool) -> int:
    """Add the graph input `forced_expert_id.{i}` i64 [F, k] of each of the MoE `layers`; give how many.

    RouteTokens(logits [T, E], forced [F, k]) -> logit [T, k], expert_id [T, k] stands where TopK was, with the
    attribute `k`. A forced id below 0 leaves the choice to the router; the logit is the expert's own in either case.
    With `optional` the input has a default that forces nothing, so that sessions may leave it out; without, no forced
    token (F = 0) is what forces nothing. To be run while experts are still ExpertDispatch.
    """
    graph = model.graph
    nodes = [node for node in graph if node.op_type == EXPERT_DISPATCH]
    for layer, node in zip(layers, nodes, strict=True):
        expert_id = node.inputs[1]
        assert expert_id is not None
        assert expert_id.shape is not None
        router, per_token = expert_id.producer(), expert_id.shape[1]
        assert router is not None
        assert isinstance(per_token, int)
        forced = ir.Value(
            name=f"{INPUT}.{layer}",
            shape=ir.Shape(["forced_tokens", per_token]),
            type=ir.TensorType(ir.DataType.INT64),
        )
        graph.inputs.append(forced)
        if optional:
            forced.const_value = ir.tensor(np.full((1, per_token), -1, np.int64), name=forced.name)
            graph.initializers[str(forced.name)] = forced
        replace_node(router, ROUTE_TOKENS, [router.inputs[0], forced], {"k": [per_token]}, DOMAIN)
    return len(nodes)
