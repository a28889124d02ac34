"""Gives expert dispatch its weights as the compiled kernels read them: a table of records, one for each expert.

The records of a layer are requested as soon as its router has chosen, and computed as late as the graph allows: what
does not depend on them, the shared expert, runs while those that memory lacks are read.
Legend: E experts, T tokens, k experts per token, F expert width.
"""

from __future__ import annotations

import onnx_ir as ir

from arriero.graphs.functions import DOMAIN, EXPERT_DISPATCH
from arriero.graphs.rewrite.nodes import insert_node, replace_node
from arriero.graphs.stored.expert_record import store_records
from arriero.graphs.stored.weight_store import WeightStore

TABLE = "ExpertTable"
REQUEST = "ExpertRequest"


def bind_experts(model: ir.Model, store: WeightStore) -> int:
    """Give every ExpertDispatch its weights; give how many.

    ExpertTable(record u8 [bytes] of each expert) -> table i64 [1 + E], with the attribute `layout`, the records'.
    ExpertRequest(expert_id [T, k], table) -> the same ids.
    ExpertDispatch(x, expert_id, score, table), with the attributes `formats` and `blocks` of gate_up and down, `at`,
    where in a record gate_up, its scales, down and its scales are, and `width`, F.
    """
    nodes = [node for node in model.graph if node.op_type == EXPERT_DISPATCH]
    for node in nodes:
        x, expert_id, score, *weights = node.inputs
        assert expert_id is not None
        gate_up, down = (str(value.name) for value in weights if value is not None)
        records, layout = store_records(store, gate_up, down)
        first = _next(expert_id.producer(), model.graph)
        table = insert_node(first, TABLE, records, DOMAIN, layout=layout.name)
        table.name = gate_up.rpartition(".")[0]
        table.shape, table.type = ir.Shape([1 + len(records)]), ir.TensorType(ir.DataType.INT64)
        requested = insert_node(first, REQUEST, [expert_id, table], DOMAIN)
        requested.shape, requested.type = expert_id.shape, expert_id.type
        width = store.checkpoint.tensors[down].shape[1]
        attributes = {"formats": layout.formats, "blocks": layout.blocks, "at": layout.at, "width": width}
        replace_node(node, EXPERT_DISPATCH, [x, requested, score, table], attributes, DOMAIN)
        _delay(node, model.graph)
    return len(nodes)


def _next(node: ir.Node | None, graph: ir.Graph) -> ir.Node:
    """The node that follows `node`."""
    nodes = iter(graph)
    for one in nodes:
        if one is node:
            return next(nodes)
    raise ValueError(f"{node} is no node of the graph")


def _delay(node: ir.Node, graph: ir.Graph) -> None:
    """Move `node` to just before the first of those that need it."""
    users = {user for user, _ in node.outputs[0].uses()}
    before = next(one for one in graph if one in users)
    graph.remove(node)
    graph.insert_before(before, node)
