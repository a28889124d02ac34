"""Turns a node into another operator in place, so that its outputs keep their consumers and their graph-output role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

CONTRIB = "com.microsoft"


def replace_node(
    node: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any], domain: str = CONTRIB
) -> None:
    """Make `node` an `op_type` of `domain` over `inputs` with `attributes`, and nothing of what it was."""
    node.op_type, node.domain, node.overload = op_type, domain, ""
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)
    node.attributes.clear()
    for attribute in ir.convenience.convert_attributes(attributes):
        node.attributes.add(attribute)


def insert_node(
    before: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], domain: str = "", **attributes: Any
) -> ir.Value:
    """Put a one-output node, a standard one where no domain is named, ahead of `before` and give its output."""
    node = ir.node(op_type, inputs, attributes, domain=domain)
    assert before.graph is not None
    before.graph.insert_before(before, node)
    return node.outputs[0]


def add_constant(before: ir.Node, value: Any) -> ir.Value:
    """Put a Constant (a python int, a list of ints, or a tensor) ahead of `before` and give its output."""
    if isinstance(value, int):
        return insert_node(before, "Constant", [], value_int=value)
    if isinstance(value, list):
        return insert_node(before, "Constant", [], value_ints=value)
    return insert_node(before, "Constant", [], value=value)
