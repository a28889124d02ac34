"""Makes run-time sizes come from the main inputs, so that a lowering may drop or reshape the others."""

from __future__ import annotations

import onnx_ir as ir


def canonicalize_shape_sources(model: ir.Model) -> int:
    """Re-point each one-axis Shape of a graph input to the first input with the same symbolic size; give how many."""
    home: dict[str, tuple[ir.Value, int]] = {}
    for value in model.graph.inputs:
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                home.setdefault(size.value, (value, axis))
    count = 0
    for node in model.graph:
        source = node.inputs[0] if node.op_type == "Shape" else None
        if source is None or not source.is_graph_input() or source.shape is None:
            continue
        start = node.attributes.get_int("start", 0)
        size = source.shape[start]
        if node.attributes.get_int("end", 0) != start + 1 or not isinstance(size, ir.SymbolicDim):
            continue
        value, axis = home[str(size.value)]
        node.replace_input_with(0, value)
        node.attributes["start"] = ir.AttrInt64("start", axis)
        node.attributes["end"] = ir.AttrInt64("end", axis + 1)
        count += 1
    return count
