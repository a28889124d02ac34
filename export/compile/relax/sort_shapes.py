"""Puts what TVM computes of shapes into one order, so that a graph is the same library whenever it is compiled.

TVM has a function of its own for the shapes of each entry, and emits its stores in the order of a table that is keyed
by addresses in memory. None reads what another one writes, so any order does. Two entries share a function where their
orders happen to be the same; here all do whose functions are equal once they are sorted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tvm
import tvm_ffi
from tvm import ir, relax, tirx
from tvm.ir import GlobalVar

SYMBOL = "global_symbol"  # the attribute with a function's own name


@ir.transform.module_pass(opt_level=0, name="SortShapes")
def sort_shapes(module: tvm.IRModule, _: Any) -> tvm.IRModule:
    """The module with the stores of its shape functions in the order of what they write, and equal ones as one."""
    names, kept, numbers = list[GlobalVar](), list[tirx.PrimFunc](), list[int]()
    for name in sorted(module.functions, key=lambda name: (len(name.name_hint), name.name_hint)):
        function = module[name]
        if isinstance(function, tirx.PrimFunc) and isinstance(function.body, tirx.SeqStmt):
            stores = list(function.body.seq)
            if _any_order_does(stores):
                made = function.with_body(tirx.SeqStmt(sorted(stores, key=_place))).without_attr(SYMBOL)
                same = [at for at, one in enumerate(kept) if tvm_ffi.structural_equal(one, made)]
                kept += [] if same else [made]
                names.append(name)
                numbers.append(same[0] if same else len(kept) - 1)
    # how many names there are is chance as well, so the first ones are taken
    instead = {name.name_hint: names[number] for name, number in zip(names, numbers, strict=True)}
    renamed = _Renamed(module, instead)
    functions = {
        name: renamed.visit_expr(function) if isinstance(function, relax.Function) else function
        for name, function in module.functions.items()
        if name.name_hint not in instead
    }
    for name, made in zip(names, kept, strict=False):
        functions[name] = made.with_attr(SYMBOL, name.name_hint)
    return tvm.IRModule(functions, attrs=module.attrs, global_infos=module.global_infos)


@relax.expr_functor.mutator
class _Renamed(relax.PyExprMutator):
    """Calls other functions in the place of some."""

    def __init__(self, module: tvm.IRModule, instead: Mapping[str, GlobalVar]) -> None:
        super().__init__(module)
        self.instead = instead

    def visit_global_var_(self, name: GlobalVar) -> GlobalVar:
        return self.instead.get(name.name_hint, name)


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
