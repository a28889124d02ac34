"""Replaces ExpertDispatch by com.microsoft MoE (exact) or QMoE (block-wise integers), with Llama 4's semantics kept.

Those kernels scale an expert's output by a softmax of router logits; Llama 4 scales its input. So the input is scaled
ahead of the node, and the logits it gets are the one-hot choice, which normalises to a weight of exactly 1.
Case 1, k = 1: Mul, OneHot, node. Case 2, k > 1: each token is repeated k times, and the k results are summed.
Legend: T tokens, k experts per token, E experts, H hidden, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

from arriero.graphs.functions import EXPERT_DISPATCH
from arriero.graphs.passes.expert_pairs import check_pair
from arriero.graphs.rewrite.nodes import CONTRIB, add_constant, insert_node, replace_node
from arriero.graphs.rewrite.topk_rows import scale_inputs, sum_choices
from arriero.graphs.stored.rounded import store_rows
from arriero.graphs.stored.weight_store import WeightStore
from arriero.profiles.schemes import Exact, IntBlock

Attributes = dict[str, int | float | str]
# Defaults of these have changed between ONNX Runtime versions: gate*sigmoid(1*gate) * (up + 0), no limit.
SWIGLU: Attributes = {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
ROUTING: Attributes = {"k": 1, "normalize_routing_weights": 1}


def replace_dispatch_with_moe(model: ir.Model, store: WeightStore) -> int:
    """Rewrite every ExpertDispatch node left, storing its weights as one row per output feature; give how many."""
    nodes = [node for node in model.graph if node.op_type == EXPERT_DISPATCH]
    for node in nodes:
        x, expert_id, score, gate_up, down = node.inputs
        assert expert_id is not None
        assert expert_id.shape is not None
        assert gate_up is not None
        assert gate_up.name is not None
        assert down is not None
        assert down.name is not None
        per_token = expert_id.shape[1]
        assert isinstance(per_token, int)
        op_type, weights, extra = _weights(store, gate_up.name, down.name)
        experts, hidden = store.checkpoint.tensors[gate_up.name].shape[:2]
        scaled = scale_inputs(node, x, score, per_token, hidden)
        chosen = insert_node(node, "Reshape", [expert_id, add_constant(node, [-1])])
        levels = add_constant(node, ir.tensor(np.array([0, 1], np.float32)))
        logits = insert_node(node, "OneHot", [chosen, add_constant(node, experts), levels], axis=-1)
        inputs = [scaled, logits, *weights]
        if per_token == 1:  # case 1
            replace_node(node, op_type, inputs, {**ROUTING, **SWIGLU, **extra})
        else:  # case 2
            mixed = ir.node(op_type, inputs, {**ROUTING, **SWIGLU, **extra}, domain=CONTRIB)
            model.graph.insert_before(node, mixed)
            sum_choices(node, mixed.outputs[0], per_token, hidden)
    return len(nodes)


def _weights(store: WeightStore, gate_up: str, down: str) -> tuple[str, list[ir.Value | None], Attributes]:
    """The operator, its weight inputs and its attributes for the scheme of these two tensors."""
    tensors = store.checkpoint.tensors
    experts, hidden, double = tensors[gate_up].shape
    fc1, fc2 = (experts, double, hidden), (experts, hidden, double // 2)
    fc1_rows, fc2_rows = _rows(store, gate_up, _interleave), _rows(store, down, _transpose)
    first, second = store.schemes[gate_up], store.schemes[down]
    check_pair(first, second, down)
    if isinstance(first, Exact):
        values = [
            store.exact_rows(f"{gate_up}.rows", fc1, fc1_rows),
            None,
            store.exact_rows(f"{down}.rows", fc2, fc2_rows),
        ]
        return "MoE", values, {}
    assert isinstance(first, IntBlock)
    assert isinstance(second, IntBlock)
    packed = [(*shape[:2], shape[2] * scheme.bits // 8) for shape, scheme in ((fc1, first), (fc2, second))]
    order = np.arange(double).reshape(2, -1).T.reshape(-1)  # as `_interleave` orders rows
    fc1_values = store_rows(store, gate_up, first, packed[0], order)
    fc2_values = store_rows(store, down, second, packed[1])
    attributes: Attributes = {
        "expert_weight_bits": first.bits,
        "fc1_expert_weight_bits": first.bits,
        "fc2_expert_weight_bits": second.bits,
        "block_size": first.block,
        "accuracy_level": first.accuracy_level,
    }
    return "QMoE", [*fc1_values, None, *fc2_values], attributes


def _rows(
    store: WeightStore, name: str, arrange: Callable[[np.ndarray], np.ndarray]
) -> Callable[[], Iterator[np.ndarray]]:
    """Pieces of one expert each, [1, N, K]."""

    def pieces() -> Iterator[np.ndarray]:
        for expert in range(store.checkpoint.tensors[name].shape[0]):
            yield arrange(store.checkpoint.read_float32(name, expert, expert + 1)[0])[None]

    return pieces


def _transpose(weight: np.ndarray) -> np.ndarray:
    """[K, N] -> [N, K]."""
    return np.ascontiguousarray(weight.T)


def _interleave(weight: np.ndarray) -> np.ndarray:
    """gate|up [H, 2F] -> rows g0, u0, g1, u1, ... [2F, H]."""
    hidden, double = weight.shape
    return np.ascontiguousarray(weight.reshape(hidden, 2, double // 2).transpose(2, 1, 0).reshape(double, hidden))
