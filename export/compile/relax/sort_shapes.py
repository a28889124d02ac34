"""Puts what TVM computes of shapes into one order, so that a graph is the same library whenever it is compiled.

TVM has a function of its own for the shapes of each entry, and emits its stores in the order of a table that is keyed
by addresses in memory. None reads what another one writes, so any order does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import tvm
from tvm import ir, tirx


@ir.transform.module_pass(opt_level=0, name="SortShapes")
def sort_shapes(module: tvm.IRModule, _: Any) -> tvm.IRModule:
    """The module with the stores of its shape functions in the order of what they write."""
    for name, function in list(module.functions.items()):
        if isinstance(function, tirx.PrimFunc) and isinstance(function.body, tirx.SeqStmt):
            stores = list(function.body.seq)
            if _any_order_does(stores):
                module[name] = function.with_body(tirx.SeqStmt(sorted(stores, key=_place)))
    return module


def _any_order_does(statements: Sequence[Any]) -> bool:
    """Whether all are stores of one buffer, at places that are known and differ, and that none of them reads."""
    if not all(isinstance(one, tirx.BufferStore) and isinstance(one.indices[0], tirx.IntImm) for one in statements):
        return False
    written = {_place(one) for one in statements}
    read = {place for one in statements for place in _places_read(one.value)}
    buffers = {one.buffer.name for one in statements}
    return len(buffers) == 1 and len(written) == len(statements) and not read & {None, *written}


def _places_read(value: Any) -> Iterator[int | None]:
    """The places that an expression of shapes reads; None for one that is not known, and for what is no arithmetic."""
    if isinstance(value, tvm.ir.expr.TensorLoad):
        yield _place(value) if isinstance(value.indices[0], tirx.IntImm) else None
    elif isinstance(value, tirx.expr.BinaryOpExpr):
        yield from _places_read(value.a)
        yield from _places_read(value.b)
    elif isinstance(value, tirx.Cast):
        yield from _places_read(value.value)
    elif not isinstance(value, tirx.IntImm):
        yield None


def _place(at: Any) -> int:
    return int(at.indices[0])
