"""Puts the runtime adapters' sums behind the products that they change; a graph input chooses the adapter of each row.

AddLora(x [.., K], y [.., N], adapter [B], A [n+1, R, K], B [n+1, N, R]) -> y + B_i A_i x with i = adapter[row]: the
LoRA paper's (Hu et al., 2021) sum, its scaling within B. Tokens of one row lie together in x and y.
"""

from __future__ import annotations

import onnx_ir as ir

from arriero.graphs.functions import ADD_LORA, DOMAIN
from arriero.graphs.rewrite.linear_weight import linear_weight
from arriero.graphs.sources.runtime_adapters import RuntimeAdapters
from arriero.graphs.stored.weight_store import WeightStore

INPUT = "adapter"


def add_adapters(model: ir.Model, store: WeightStore, adapters: RuntimeAdapters, rows: str = "batch") -> int:
    """Add the graph input `adapter` i64 [B] and an AddLora behind each product that an adapter changes; give how many.

    To be run while products still are standard operators. `rows` is the graph's name of B.
    """
    chosen = ir.Value(name=INPUT, shape=ir.Shape([rows]), type=ir.TensorType(ir.DataType.INT64))
    model.graph.inputs.append(chosen)
    count = 0
    for node in list(model.graph):
        name = linear_weight(node, adapters.deltas)
        if name is None:
            continue
        product = node.outputs[0]
        consumers = list(product.uses())
        factors = [
            store.exact_rows(f"{name}.lora_{side}", factor.shape, lambda factor=factor: [factor])  # type: ignore[misc]
            for side, factor in zip("AB", adapters.stack(name), strict=True)
        ]
        added = ir.node(ADD_LORA, [node.inputs[0], product, chosen, *factors], domain=DOMAIN)
        added.outputs[0].shape, added.outputs[0].type = product.shape, product.type
        model.graph.insert_after(node, added)
        for user, index in consumers:
            user.replace_input_with(index, added.outputs[0])
        count += 1
    return count
