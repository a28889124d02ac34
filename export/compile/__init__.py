"""Compilers: one file per backend, from lowered graphs to what the runtime loads.

Each has `compile_graphs(folder, parts, device, watch) -> Compiled`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arriero.export.compile.nvidia.engine_shapes import Limits
    from arriero.export.compile.nvidia.gpus import Gpu

# What a compiler reports: the step, how much of it is done, of how much, and in which unit.
Watch = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class MemoryBudget:
    """What a budget leaves the engines of a GPU's memory beside the cache, in bytes.

    `scratch` is for what they compute in, `weights` for their weights: those beyond it stay in the host's memory and
    are sent anew for every step. None: all of them fit.
    """

    scratch: int
    weights: int | None = None


@dataclass(frozen=True)
class Device:
    """What a target is compiled for. A compiler reads what its kind of device has; the rest is None."""

    cpu: str | None = None  # a name or an LLVM triple
    kernels: Path | None = None  # the object file of our kernels for that processor
    gpu: Gpu | None = None
    limits: Limits | None = None  # of the engines' shapes
    memory: MemoryBudget | None = None  # of the GPU; None for all of it


def no_watch(step: str, done: int, total: int, unit: str) -> None:
    """Report nothing."""
