"""Makes the embedding's lookup one node, which widens only the rows that it reads."""

from __future__ import annotations

import onnx_ir as ir

from arriero.graphs.functions import DOMAIN
from arriero.graphs.rewrite.nodes import replace_node
from arriero.graphs.stored.weight_store import WeightStore

LOOKUP = "EmbeddingLookup"


def replace_lookup(model: ir.Model, store: WeightStore) -> int:
    """Make Cast(Gather(table, ids)) one EmbeddingLookup node, which widens only the rows it reads; give how many."""
    count = 0
    for node in list(model.graph):
        table = node.inputs[0] if node.op_type == "Gather" else None
        if table is None or table.name not in store.checkpoint.tensors:
            continue
        cast = next(iter(node.outputs[0].consumers()), node)
        owner = cast if cast.op_type == "Cast" else node
        replace_node(owner, LOOKUP, [store.stored(str(table.name)), node.inputs[1]], {}, DOMAIN)
        count += 1
    return count
