"""Makes products with checkpoint matrices nodes of the compiled kernels (`arriero.graphs.stored.packed_panels`)."""

from __future__ import annotations

import onnx_ir as ir

from arriero.graphs.functions import DOMAIN
from arriero.graphs.rewrite.linear_weight import TIED, linear_weight
from arriero.graphs.rewrite.nodes import replace_node
from arriero.graphs.stored.panels import store_matrix
from arriero.graphs.stored.weight_store import WeightStore

LINEAR = "Linear"


def replace_linear_with_kernel(model: ir.Model, store: WeightStore) -> int:
    """Make each product with a matrix [N, K] of the checkpoint a Linear node; give how many.

    Inputs: x [.., K], the weight (and its scales). Attributes: `format` and `block`, the weight's, `features`, N, and
    `codes`, how many int8 codes each activation is rounded to.
    """
    count = 0
    for node in list(model.graph):
        name = linear_weight(node, store.checkpoint.tensors)
        if name is None:
            continue
        weight, stored = store_matrix(store, name, TIED.get(name))
        features = store.checkpoint.tensors[name].shape[0]
        codes = store.schemes[name].codes
        attributes = {"format": stored.name, "block": stored.block, "features": features, "codes": codes}
        replace_node(node, LINEAR, [node.inputs[0], *weight], attributes, DOMAIN)
        count += 1
    return count
