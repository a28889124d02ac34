"""Settles what a Reshape does from the traced shapes, so that no importer has to follow sizes through arithmetic."""

from __future__ import annotations

import onnx_ir as ir

from arriero.graphs.rewrite.nodes import add_constant


def fold_reshape_shapes(model: ir.Model) -> int:
    """Give each Reshape a constant target where its input's and output's shapes decide it; give how many.

    A size of the input that stays at its axis becomes 0, one other symbolic size becomes -1. Two such sizes (rows
    unfolded into batch and sequence) stay computed, but from whole Shape values: case 1, Reshape(Squeeze(Shape(x)),
    [-1]) is that Shape itself.
    """
    count = 0
    for node in list(model.graph):
        if node.op_type != "Reshape":
            continue
        value = node.inputs[0]
        assert value is not None
        size = _squeezed_size(value)
        if size is not None:  # case 1
            node.outputs[0].replace_all_uses_with(size)
            model.graph.remove(node, safe=True)
            continue
        target = _target(value.shape, node.outputs[0].shape)
        if target is not None:
            node.replace_input_with(1, add_constant(node, target))
            node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
            count += 1
    return count


def _squeezed_size(value: ir.Value) -> ir.Value | None:
    """The [1] Shape value whose only element `value` is."""
    squeeze = value.producer()
    if squeeze is None or squeeze.op_type != "Squeeze" or squeeze.inputs[0] is None:
        return None
    shape = squeeze.inputs[0].producer()
    return squeeze.inputs[0] if shape is not None and shape.op_type == "Shape" else None


def _target(before: ir.Shape | None, after: ir.Shape | None) -> list[int] | None:
    if before is None or after is None:
        return None
    target = []
    for axis, size in enumerate(after):
        if isinstance(size, int):
            target.append(size)
        else:
            target.append(0 if axis < len(before) and before[axis] == size else -1)
    return target if target.count(-1) <= 1 else None
