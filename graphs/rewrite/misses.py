"""Why a pass left a node that it was looking for: said on the node, and gathered when a count comes out wrong."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

KEY = "arriero.misses"


def miss(node: ir.Node, sought: str, why: str) -> None:
    """Say on `node` why a pass that turns nodes of the kind `sought` leaves this one."""
    node.meta.setdefault(KEY, []).append((sought, why))


def describe_misses(nodes: Iterable[ir.Node], sought: str, most: int = 5) -> str:
    """The nodes of the kind `sought` that are left, with what passes said of each; the first `most` of them."""
    left = [
        (node.name or node.op_type, reasons)
        for node in nodes
        if (reasons := [why for kind, why in node.meta.get(KEY, ()) if kind == sought]) or node.op_type == sought
    ]
    shown = [f"{name}: {', and '.join(reasons) or 'no pass looked at it'}" for name, reasons in left[:most]]
    more = [f"and {len(left) - most} more"] if len(left) > most else []
    return "; ".join([*shown, *more]) or "no such node is left in the graph"
