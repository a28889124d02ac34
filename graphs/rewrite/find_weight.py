"""Looks through Cast and Transpose to the checkpoint tensor that a value comes from."""

from __future__ import annotations

from collections.abc import Container

import onnx_ir as ir


def find_weight(value: ir.Value | None, names: Container[str], through: tuple[str, ...] = ("Cast",)) -> str | None:
    """The tensor of `names` that `value` is, seen through nodes of the types `through`; None if it is none."""
    while value is not None and not value.is_initializer():
        node = value.producer()
        if node is None or node.op_type not in through:
            return None
        value = node.inputs[0]
    return value.name if value is not None and value.name in names else None
