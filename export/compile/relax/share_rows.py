"""Has elementwise functions go over rows, and shares the rows out among threads for steps of many tokens.

What TVM generates runs its blocks one after the other on the calling thread, each over all rows; norms, rotary, gates
and sums so take the more of a prompt the more threads there are for its products. Here a function goes over the rows
once, block after block within a row, so that what lies between blocks stays in cache. Sums over a row are taken in
several lanes, as one number after the other waits for the last. Alone or shared out, a row is the same code, and so has
the same bits: LLVM contracts products and sums where it sees both at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import tvm
import tvm_ffi
from tvm import relax, s_tir, tirx
from tvm.ir import GlobalVar

ROW = 64  # numbers of a row; less is not worth a thread's while
LANES = 16  # sums of a row, where they divide it and it has more
MANY = 16  # rows; with fewer, threads would wait for each other longer than they work


def share_rows(module: tvm.IRModule, entries: Sequence[str]) -> tvm.IRModule:
    """The module whose functions go over rows, those that `entries` call with their rows shared out."""
    kept = [name.name_hint for name, function in module.functions.items() if isinstance(function, relax.Function)]
    shared = _Shared(module)
    for entry in entries:
        name = module.get_global_var(entry)
        shared.builder_.update_func(name, shared.visit_expr(module[name]))
    return relax.transform.DeadCodeElimination(kept)(shared.builder_.get())


def calls_threads(module: tvm.IRModule, entry: str) -> bool:
    """Whether any function that `entry` calls shares a loop out among threads itself, which our kernels do not show."""
    called = [module[name] for name in relax.analysis.all_global_vars(module[entry])]
    shared = list[tirx.For]()
    for function in called:
        if isinstance(function, tirx.PrimFunc):
            tvm_ffi.structural_walk(function.body, (tirx.For, shared.append))
    return any(loop.kind == tirx.ForKind.PARALLEL for loop in shared)


@relax.expr_functor.mutator
class _Shared(relax.PyExprMutator):
    """Replaces the functions that are called by those whose rows are shared out, where there are any."""

    def __init__(self, module: tvm.IRModule) -> None:
        super().__init__(module)
        self.instead: dict[str, GlobalVar] = {}
        for name, function in module.functions.items():
            if isinstance(function, tirx.PrimFunc) and (both := _over_rows(function)) is not None:
                alone, shared = both
                self.builder_.update_func(name, alone)
                self.instead[name.name_hint] = self.builder_.add_func(shared, f"{name.name_hint}_rows")

    def visit_global_var_(self, name: GlobalVar) -> GlobalVar:
        return self.instead.get(name.name_hint, name)


def _over_rows(function: tirx.PrimFunc) -> tuple[tirx.PrimFunc, tirx.PrimFunc] | None:
    """The function as one loop over the rows of what it gives, and with that shared out among threads.

    None where there are no such rows, or they are only looked at anew.
    """
    if relax.analysis.has_reshape_pattern(function):
        return None
    *_, out = function.params
    *rows, width = out.shape
    fixed = [int(size) for size in out.shape if isinstance(size, tirx.IntImm)]
    if len(fixed) == len(out.shape) or math.prod(fixed) < ROW or not isinstance(width, tirx.IntImm):
        return None
    schedule = s_tir.Schedule(function)
    try:
        partial = _take_lanes(schedule)
        blocks = schedule.get_child_blocks(schedule.get_sblock("root"))
        *_, last = blocks
        row = schedule.fuse(*schedule.get_loops(last)[: len(rows)])
        for block in reversed(blocks[:-1]):
            schedule.compute_at(block, row)
        for block in partial:
            *_, lane, step = schedule.get_loops(block)
            schedule.reorder(step, lane)
            schedule.vectorize(lane)
        alone = schedule.mod["main"]
        schedule.parallel(row)
    except s_tir.ScheduleError:  # one of our kernels, or blocks over other axes
        return None
    return alone, schedule.mod["main"]


def _take_lanes(schedule: s_tir.Schedule) -> list[s_tir.schedule.SBlockRV]:
    """Split sums over a row into those of `LANES` lanes; gives the blocks of the lanes."""
    partial = []
    for block in schedule.get_child_blocks(schedule.get_sblock("root")):
        axes = schedule.get(block).iter_vars
        summed = [axis.dom.extent for axis in axes if axis.iter_type == tirx.IterVar.CommReduce]
        if [size for size in summed if isinstance(size, tirx.IntImm) and size > LANES and size % LANES == 0]:
            *outer, last = schedule.get_loops(block)
            _, lane = schedule.split(last, [None, LANES])
            partial.append(schedule.rfactor(lane, factor_axis=len(outer)))
    return partial
