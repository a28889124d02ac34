"""Compilers: one file per backend, from lowered graphs to what the runtime loads.

Each has `compile_graphs(folder, parts, cpu, kernels, watch) -> Compiled`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# What a compiler tells: how many graphs are done, of how many.
Watch = Callable[[int, int], None]


@dataclass(frozen=True)
class Compiled:
    """What the manifest records of a compilation: the tools' versions, and what the result needs of a processor."""

    tools: dict[str, str]
    cpu: str | None = None  # as LLVM names it: triple, CPU, features
    arch: str = "any"
    features: tuple[str, ...] = ()  # in Linux's names
