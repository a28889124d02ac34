"""Computes experts with standard operators alone, over tiles of tokens that were routed to the same expert.

Every expert's (token, choice) pairs are packed into whole tiles of M rows, and each tile is multiplied with its own
expert's matrices, gathered. The number of tiles follows from the number of pairs P alone, not from where they went:
at most (P + min(E, P) (M - 1)) / M tiles hold any routing, so that one token makes one tile, no shape depends on data,
and the graph needs neither loop nor branch. A tile that is left over takes an expert that is routed to anyway: an
unrouted expert's weights are never read. Rows that fill a tile up are computed and read by nobody.
Memory: each tile has a copy of its expert's matrices. Decoding that is k experts per token; for a prompt piece of 512
tokens it is about min(E, P) + P / M experts' worth, once per layer at a time.
Legend: T tokens, k experts per token, P = T k pairs, E experts, M rows per tile, n tiles, H hidden, F expert width.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from arriero.graphs.functions import EXPERT_DISPATCH
from arriero.graphs.rewrite.nodes import add_constant, insert_node, replace_node
from arriero.graphs.rewrite.scheme_products import multiply_gathered
from arriero.graphs.rewrite.topk_rows import scale_inputs, sum_choices
from arriero.graphs.stored.weight_store import WeightStore
from arriero.traits import PREFILL_PIECE

INT32, INT64 = int(ir.DataType.INT32), int(ir.DataType.INT64)
LEAST, MOST = 16, 64  # rows: the height of a matrix unit's tile, and where fewer copies are no longer worth the waste


def tile_experts(model: ir.Model, store: WeightStore, activations: str) -> int:
    """Replace every ExpertDispatch; give how many. `activations`: the dtype beside int4 weights, F32, F16 or BF16."""
    nodes = [node for node in model.graph if node.op_type == EXPERT_DISPATCH]
    for node in nodes:
        x, expert_id, score, gate_up, down = node.inputs
        assert expert_id is not None
        assert expert_id.shape is not None
        assert gate_up is not None
        assert down is not None
        per_token, (experts, hidden, _) = expert_id.shape[1], store.checkpoint.tensors[str(gate_up.name)].shape
        assert isinstance(per_token, int)
        scaled = scale_inputs(node, x, score, per_token, hidden)  # [P, H]: the score scales the expert's input
        height = tile_rows(experts, per_token)
        slot, pair, expert = _pack(node, expert_id, experts, height)
        rows = insert_node(node, "Gather", [scaled, pair], axis=0)
        tiles = insert_node(node, "Reshape", [rows, add_constant(node, [-1, height, hidden])])
        both = multiply_gathered(node, store, str(gate_up.name), tiles, expert, activations)
        split = ir.node("Split", [both], {"axis": -1, "num_outputs": 2}, num_outputs=2)
        model.graph.insert_before(node, split)
        gate, up = split.outputs
        inner = insert_node(node, "Mul", [insert_node(node, "Mul", [gate, insert_node(node, "Sigmoid", [gate])]), up])
        outer = multiply_gathered(node, store, str(down.name), inner, expert, activations)
        flat = insert_node(node, "Reshape", [outer, add_constant(node, [-1, hidden])])
        if per_token == 1:
            replace_node(node, "Gather", [flat, slot], {"axis": 0}, domain="")
            continue
        sum_choices(node, insert_node(node, "Gather", [flat, slot], axis=0), per_token, hidden)
    return len(nodes)


def tile_rows(experts: int, per_token: int) -> int:
    """M: twice the pairs that an expert gets of a prompt piece on average, as a power of two."""
    mean = 2 * PREFILL_PIECE * per_token / experts
    return int(min(MOST, max(LEAST, 2 ** round(np.log2(mean)))))


def _pack(node: ir.Node, expert_id: ir.Value, experts: int, height: int) -> tuple[ir.Value, ir.Value, ir.Value]:
    """The slot of each pair [P], the pair in each slot [n M] (0 where none is), the expert of each tile [n]."""

    def number(value: int) -> ir.Value:
        return add_constant(node, ir.tensor(np.array(value, np.int32)))

    ids = insert_node(
        node, "Cast", [insert_node(node, "Reshape", [expert_id, add_constant(node, [-1])])], to=INT32
    )  # [P]
    every = add_constant(node, ir.tensor(np.arange(experts, dtype=np.int32)))
    chosen = insert_node(node, "Equal", [insert_node(node, "Unsqueeze", [ids, add_constant(node, [1])]), every])
    onehot = insert_node(node, "Cast", [chosen], to=INT32)  # [P, E]
    # the rank of a pair among those of its expert
    running = insert_node(node, "CumSum", [onehot, add_constant(node, ir.tensor(np.array(0, np.int64)))])
    own = insert_node(
        node, "ReduceSum", [insert_node(node, "Mul", [running, onehot]), add_constant(node, [1])], keepdims=0
    )
    rank = insert_node(node, "Sub", [own, number(1)])
    counts = insert_node(node, "ReduceSum", [onehot, add_constant(node, [0])], keepdims=0)  # [E]
    full = insert_node(node, "Div", [insert_node(node, "Add", [counts, number(height - 1)]), number(height)])
    end = insert_node(node, "CumSum", [full, add_constant(node, ir.tensor(np.array(0, np.int64)))])  # [E], in tiles
    start = insert_node(node, "Mul", [insert_node(node, "Sub", [end, full]), number(height)])  # [E], in slots
    slot = insert_node(node, "Add", [insert_node(node, "Gather", [start, ids], axis=0), rank])  # [P]

    # sizes, from shapes alone
    pairs = insert_node(node, "Shape", [ids])  # [1]
    most = insert_node(node, "Min", [pairs, add_constant(node, [experts])])
    padded = insert_node(node, "Add", [pairs, insert_node(node, "Mul", [most, add_constant(node, [height - 1])])])
    tiles = insert_node(node, "Div", [padded, add_constant(node, [height])])
    slots = insert_node(node, "Mul", [tiles, add_constant(node, [height])])

    empty = insert_node(node, "Expand", [number(0), slots])
    pair = insert_node(node, "ScatterElements", [empty, slot, _count(node, pairs)], axis=0)  # [n M]
    tile = insert_node(node, "Unsqueeze", [_count(node, tiles), add_constant(node, [1])])  # [n, 1]
    past = insert_node(node, "Cast", [insert_node(node, "LessOrEqual", [end, tile])], to=INT32)  # [n, E]
    owner = insert_node(node, "ReduceSum", [past, add_constant(node, [1])], keepdims=0)
    last = insert_node(node, "ReduceMax", [ids, add_constant(node, [0])], keepdims=1)
    return slot, pair, insert_node(node, "Min", [owner, last])


def _count(node: ir.Node, size: ir.Value) -> ir.Value:
    """0, 1, .. up to `size` [1] as int32."""
    stop = insert_node(node, "Squeeze", [size, add_constant(node, [0])])
    limits = [add_constant(node, ir.tensor(np.array(value, np.int64))) for value in (0, 1)]
    return insert_node(node, "Cast", [insert_node(node, "Range", [limits[0], stop, limits[1]])], to=INT32)
