"""Fuses the traced rotation of interleaved pairs into one RotaryEmbedding node per query and key.

Pattern, for x [B, S, heads*D] and angles as cos, sin [B, S, D/2]:
    even, odd = the pairs of Reshape(x) [B, S, heads, D/2, 2]
    Reshape(Concat(Unsqueeze(even*cos - odd*sin), Unsqueeze(even*sin + odd*cos))) [B, S, heads, D]
Everything after that Reshape (QK-norm) stays as it is.
"""

from __future__ import annotations

import onnx_ir as ir

from arriero.graphs.rewrite.misses import miss
from arriero.graphs.rewrite.nodes import add_constant, insert_node, replace_node

# What the trace puts between a factor and the value it comes from; none of it changes an element.
ROTARY = "RotaryEmbedding"
VIEWS = ("Unsqueeze", "Slice", "Squeeze", "Reshape")


def fuse_rotary(model: ir.Model) -> int:
    """Rewrite every rotation of queries and keys, whose angles come from the positions; give how many."""
    count = 0
    for concat in list(model.graph):
        rotated = _rotated(concat) if concat.op_type == "Concat" and len(concat.inputs) == 2 else None
        if rotated is None:
            continue
        reshape, x, cos, sin = rotated
        assert reshape.outputs[0].shape is not None
        heads, size = reshape.outputs[0].shape[2:]
        assert isinstance(heads, int)
        assert isinstance(size, int)
        turned = insert_node(reshape, ROTARY, [x, cos, sin], num_heads=heads, interleaved=1)
        replace_node(reshape, "Reshape", [turned, add_constant(reshape, [0, 0, heads, size])], {}, domain="")
        count += 1
    return count


def _rotated(concat: ir.Node) -> tuple[ir.Node, ir.Value, ir.Value, ir.Value] | None:
    """The final Reshape, x, cos and sin of the rotation that ends in `concat`; None for any other Concat."""
    difference, total = (_producer(value, "Unsqueeze") for value in concat.inputs)
    minus = _producer(difference.inputs[0], "Sub") if difference else None
    plus = _producer(total.inputs[0], "Add") if total else None
    if minus is None or plus is None:
        return None  # no rotation ends here
    readers = list(concat.outputs[0].consumers())
    if len(readers) != 1 or readers[0].op_type != "Reshape":
        miss(concat, ROTARY, f"it is read by {[node.op_type for node in readers]}, not by one Reshape")
        return None
    products = [_producer(value, "Mul") for value in (*minus.inputs, *plus.inputs)]
    factors = [tuple(node.inputs) if node else (None, None) for node in products]
    (even, cos), (odd, sin) = factors[0], factors[1]
    if factors[2] != (even, sin) or factors[3] != (odd, cos):
        miss(concat, ROTARY, "its products are not those of one pair with one angle")
        return None
    cos_table, sin_table, x, same_x = _origin(cos), _origin(sin), _origin(even), _origin(odd)
    if x is None or x is not same_x or cos_table is None or sin_table is None:
        miss(concat, ROTARY, "the two halves of its pairs are not of one tensor")
        return None
    shapes = [table.shape for table in (cos_table, sin_table)]
    if any(shape is None or len(shape) != 3 for shape in shapes):
        miss(concat, ROTARY, f"its angles are {shapes}, not [B, S, D/2]")
        return None
    return readers[0], x, cos_table, sin_table


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def _origin(value: ir.Value | None) -> ir.Value | None:
    """The value that `value` is a view of."""
    while value is not None and (node := value.producer()) is not None and node.op_type in VIEWS:
        value = node.inputs[0]
    return value
