"""Shares the rows of elementwise functions out among threads, for steps of many tokens.

What TVM generates runs its blocks one after the other on the calling thread, each over all rows; norms, rotary, gates
and sums so take the more of a prompt the more threads there are for its products. A shared function goes over the
rows once, block after block within a row, so that what lies between blocks stays in cache. A row's numbers are
computed as before, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import tvm
from tvm import relax, s_tir, tirx
from tvm.ir import GlobalVar

ROW = 64  # numbers of a row; less is not worth a thread's while
MANY = 16  # rows; with fewer, threads would wait for each other longer than they work


def share_rows(module: tvm.IRModule, entries: Sequence[str]) -> tvm.IRModule:
    """The module in which the functions that `entries` call have their rows shared; what others call stays as it is."""
    kept = [name.name_hint for name, function in module.functions.items() if isinstance(function, relax.Function)]
    shared = _Shared(module)
    for entry in entries:
        name = module.get_global_var(entry)
        shared.builder_.update_func(name, shared.visit_expr(module[name]))
    return relax.transform.DeadCodeElimination(kept)(shared.builder_.get())


@relax.expr_functor.mutator
class _Shared(relax.PyExprMutator):
    """Replaces the functions that are called by those with shared rows, where there are any."""

    def __init__(self, module: tvm.IRModule) -> None:
        super().__init__(module)
        self.instead: dict[str, GlobalVar] = {}
        for name, function in module.functions.items():
            if isinstance(function, tirx.PrimFunc) and (rows := _over_rows(function)) is not None:
                self.instead[name.name_hint] = self.builder_.add_func(rows, f"{name.name_hint}_rows")

    def visit_global_var_(self, name: GlobalVar) -> GlobalVar:
        return self.instead.get(name.name_hint, name)


def _over_rows(function: tirx.PrimFunc) -> tirx.PrimFunc | None:
    """The function with one parallel loop over the rows of what it gives; None where it has none, or only views it."""
    if relax.analysis.has_reshape_pattern(function):
        return None
    *_, out = function.params
    *rows, width = out.shape
    fixed = [int(size) for size in out.shape if isinstance(size, tirx.IntImm)]
    if len(fixed) == len(out.shape) or math.prod(fixed) < ROW or not isinstance(width, tirx.IntImm):
        return None
    schedule = s_tir.Schedule(function)
    try:
        blocks = schedule.get_child_blocks(schedule.get_sblock("root"))
        *_, last = blocks
        row = schedule.fuse(*schedule.get_loops(last)[: len(rows)])
        for block in reversed(blocks[:-1]):
            schedule.compute_at(block, row)
        schedule.parallel(row)
    except s_tir.ScheduleError:  # one of our kernels, or blocks over other axes
        return None
    return schedule.mod["main"]
