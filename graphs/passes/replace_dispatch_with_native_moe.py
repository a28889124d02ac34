"""Replaces ExpertDispatch by TensorRT's own mixture of experts, TRT_MoE, with Llama 4's semantics kept.

That node weights an expert's OUTPUT by the score; Llama 4 scales its input. So the input is scaled ahead of the node,
and its scores are 1. Case 1, k = 1: one row per token. Case 2, k > 1: each token is repeated k times, and the k results
are summed. Weights are in 16-bit floats; gate and up are stored apart.
Legend: T tokens, k experts per token, P = T k, E experts, H hidden, F expert width.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from arriero.graphs.functions import EXPERT_DISPATCH
from arriero.graphs.rewrite.misses import miss
from arriero.graphs.rewrite.nodes import add_constant, insert_node, replace_node
from arriero.graphs.rewrite.scheme_products import FLOAT, TYPES
from arriero.graphs.rewrite.topk_rows import scale_inputs, sum_choices
from arriero.graphs.stored.safetensors_writer import Spec
from arriero.graphs.stored.weight_store import HALVES, WeightStore, narrow
from arriero.profiles.schemes import Half

NATIVE_MOE, NATIVE_DOMAIN = "TRT_MoE", "trt"
SILU = 1
INT32 = int(ir.DataType.INT32)


def replace_dispatch_with_native_moe(model: ir.Model, store: WeightStore) -> int:
    """Rewrite every ExpertDispatch whose experts are in 16-bit floats; give how many. Others are left as they are."""
    count = 0
    for node in [node for node in model.graph if node.op_type == EXPERT_DISPATCH]:
        x, expert_id, score, gate_up, down = node.inputs
        assert expert_id is not None
        assert expert_id.shape is not None
        names = [str(value.name) for value in (gate_up, down) if value is not None]
        scheme = store.schemes[names[0]]
        if not isinstance(scheme, Half) or store.schemes[names[1]] != scheme:
            miss(node, EXPERT_DISPATCH, f"{names[0]} is {scheme.description}: the native one takes one 16-bit format")
            continue
        per_token, hidden = expert_id.shape[1], store.checkpoint.tensors[names[0]].shape[1]
        assert isinstance(per_token, int)
        dtype = TYPES[scheme.label.upper()]
        scaled = insert_node(node, "Cast", [scale_inputs(node, x, score, per_token, hidden)], to=int(dtype))
        rows = insert_node(node, "Reshape", [scaled, add_constant(node, [1, -1, hidden])])  # [1, P, H]
        ids = insert_node(node, "Reshape", [expert_id, add_constant(node, [1, -1, 1])])
        chosen = insert_node(node, "Cast", [ids], to=INT32)
        one = insert_node(node, "Cast", [add_constant(node, ir.tensor(np.array(1, np.float32)))], to=int(dtype))
        ones = insert_node(node, "Expand", [one, insert_node(node, "Shape", [chosen])])
        weights = [*_halves(store, names[0], scheme), store.half(names[1])]
        mixed = ir.node(
            NATIVE_MOE, [rows, chosen, ones, *weights], {"activation_type": SILU}, domain=NATIVE_DOMAIN
        )  # [1, P, H]
        model.graph.insert_before(node, mixed)
        wide = insert_node(node, "Cast", [mixed.outputs[0]], to=int(FLOAT))
        if per_token == 1:  # case 1
            replace_node(node, "Reshape", [wide, add_constant(node, [-1, hidden])], {}, domain="")
        else:  # case 2
            sum_choices(node, wide, per_token, hidden)
        count += 1
    if count:
        model.opset_imports[NATIVE_DOMAIN] = 1
    return count


def _halves(store: WeightStore, name: str, scheme: Half) -> list[ir.Value]:
    """Gate and up [E, H, F] of the stack `name` [E, H, 2F]."""
    experts, hidden, double = store.checkpoint.tensors[name].shape
    label = scheme.label.upper()
    specs = [Spec(f"{name}.{half}", label, (experts, hidden, double // 2)) for half in ("gate", "up")]

    def pieces() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for expert in range(experts):
            rows = narrow(store.checkpoint.read_float32(name, expert, expert + 1), HALVES[label], name).view(np.uint16)
            gate, up = np.split(rows, 2, -1)
            yield gate, up

    return store.promise(specs, scheme.label, pieces)
