"""Gives attention, expert dispatch and products with checkpoint matrices the form that the compiled kernels take.

The three become one node each of domain `ai.arriero`, whose weight inputs are stored as the kernels read them: exact
ones byte for byte as the checkpoint has them, integers in panels (`arriero.graphs.stored.packed_panels`).
Legend: B batch, S new tokens, K key/value heads, D head size, C buffer capacity in tokens, T tokens, k experts per
token, E experts, H hidden, F expert width.
"""

from __future__ import annotations

import onnx_ir as ir

from arriero.graphs.functions import CACHED_ATTENTION, DOMAIN, EXPERT_DISPATCH
from arriero.graphs.passes.replace_linear import TIED, linear_weight
from arriero.graphs.rewrite import replace_node
from arriero.graphs.stored.panels import store_experts, store_matrix
from arriero.graphs.stored.weight_store import WeightStore

LINEAR = "Linear"
LOOKUP = "EmbeddingLookup"


def cache_in_place(model: ir.Model) -> int:
    """Let every CachedAttention write into its cache inputs [B, K, C, D]; give how many.

    The node is left with out [B, S, N*D] and reads q, k, v, the two buffers and `positions`. The positions of past keys
    and the present outputs leave the signature: a token at position p lies in slot p (global) or p % chunk, and the
    runtime steps no row across a chunk boundary, so that the slots a query sees are those up to its own.
    """
    graph = model.graph
    nodes = [node for node in graph if node.op_type == CACHED_ATTENTION]
    for node in nodes:
        kind = "chunk" if node.attributes["chunk"].as_int() else "global"
        for value in node.inputs[3:5]:
            assert value is not None
            assert value.shape is not None
            value.shape = ir.Shape([value.shape[0], value.shape[1], f"{kind}_capacity", value.shape[3]])
        for value in node.outputs[1:]:
            graph.outputs.remove(value)
        node.resize_outputs(1)
        node.resize_inputs(6)
    for name in ("chunk_past_positions", "global_past_positions"):
        graph.inputs.remove(next(value for value in graph.inputs if value.name == name))
    return len(nodes)


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


def replace_linear_with_kernel(model: ir.Model, store: WeightStore) -> int:
    """Make each product with a matrix [N, K] of the checkpoint a Linear node; give how many.

    Inputs: x [.., K], the weight (and its scales). Attributes: `form`, bits and block, and `features`, N.
    """
    count = 0
    for node in list(model.graph):
        name = linear_weight(node, store.checkpoint.tensors)
        if name is None:
            continue
        weight, form = store_matrix(store, name, TIED.get(name))
        attributes = {"form": form, "features": store.checkpoint.tensors[name].shape[0]}
        replace_node(node, LINEAR, [node.inputs[0], *weight], attributes, DOMAIN)
        count += 1
    return count


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
