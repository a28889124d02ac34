"""Compilers: one file per backend, from lowered graphs to what the runtime loads.

Each has `compile_graphs(folder, parts, cpu, kernels, watch) -> Compiled`; those for GPUs take a GPU and the limits of
the target in place of processor and kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# What a compiler tells: how many graphs (for GPUs: hundredths of graphs) are done, of how many.
Watch = Callable[[int, int], None]


@dataclass(frozen=True)
class MemoryBudget:
    """What a budget leaves the engines of a GPU's memory beside the cache, in bytes.

    `scratch` is for what they compute in, `weights` for their weights: those beyond it stay in the host's memory and
    are sent anew for every step. None: all of them fit.
    """

    scratch: int
    weights: int | None = None
