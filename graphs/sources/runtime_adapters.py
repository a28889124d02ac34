"""LoRA adapters that a bundle switches between while it runs: their factors, stacked for the graph to choose from.

Legend: n adapters, R rank, N output features, K input features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from arriero.errors import ArrieroError, Problems
from arriero.graphs.sources.adapters import Adapter, Delta, Floats
from arriero.graphs.sources.weight_source import WeightSource
from arriero.profiles.groups import group_of

SWITCHABLE = (
    "attention",
    "shared_expert",
    "mlp",
)  # the groups whose matrices an adapter may change while a bundle runs


@dataclass(frozen=True)
class RuntimeAdapters:
    """The adapters of a bundle in the order of their numbers, which begin at 1: 0 is the model itself."""

    names: tuple[str, ...] = ()
    deltas: Mapping[str, tuple[Delta | None, ...]] = field(default_factory=dict)  # by tensor, one of each adapter

    @classmethod
    def read(cls, tensors: Mapping[str, WeightSource], folders: Mapping[str, Path]) -> RuntimeAdapters:
        """Read the adapters in `folders` (name -> folder) for the model of `tensors`.

        Raises `Problems` with what an adapter changes beside linear layers of attention, shared experts and dense MLPs,
        and as `Adapter.read` does.
        """
        found, problems = dict[str, list[Delta | None]](), list[ArrieroError]()
        for number, (name, folder) in enumerate(folders.items()):
            try:
                adapter = Adapter.read(tensors, folder)
            except ArrieroError as error:
                problems += error.problems if isinstance(error, Problems) else [error]
                continue
            fixed = sorted(
                {*adapter.whole, *(tensor for tensor, _ in adapter.deltas if group_of(tensor) not in SWITCHABLE)}
            )
            if fixed:
                what = f"changes {len(fixed)} tensors that cannot be switched while a bundle runs, as {fixed[0]}"
                expected = "attention, shared experts and dense MLPs alone"
                remedy = f"Merge it: `adapters: [{folder}]`, in a build file of its own"
                problems.append(ArrieroError(what, where=f"runtime_adapters.{name}", expected=expected, remedy=remedy))
            for tensor, delta in adapter.deltas:
                found.setdefault(tensor, [None] * len(folders))[number] = delta
        if problems:
            raise Problems("the runtime adapters cannot be honoured", problems)
        return cls(tuple(folders), {tensor: tuple(deltas) for tensor, deltas in found.items()})

    def stack(self, tensor: str) -> tuple[Floats, Floats]:
        """A [n+1, R, K] and B [n+1, N, R] of `tensor`, scaled; zeros for number 0 and beyond an adapter's own rank."""
        a, b = (np.zeros(shape, np.float32) for shape in self._shapes(tensor))
        for number, delta in enumerate(self.deltas[tensor], 1):
            if delta is not None:
                own = delta.a.shape[0]
                a[number, :own], b[number, :, :own] = delta.a, delta.b * delta.scaling
        return a, b

    @property
    def nbytes(self) -> int:
        """Bytes of all stacks."""
        return sum(4 * math.prod(shape) for tensor in self.deltas for shape in self._shapes(tensor))

    def _shapes(self, tensor: str) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        deltas = self.deltas[tensor]
        present = [delta for delta in deltas if delta is not None]
        rank, count = max(delta.a.shape[0] for delta in present), len(deltas) + 1
        return (count, rank, present[0].a.shape[1]), (count, present[0].b.shape[0], rank)
