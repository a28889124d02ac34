"""What the router of one layer sent to its experts, in files that every process may read, and what experts make of it.

Legend: T tokens of all samples, H hidden, F expert width, E experts, k experts per token, n tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arriero.profiles.moments import ROWS

Floats = NDArray[np.float32]
ROUTED = ("routed.partial", "routed-inner.partial")  # what experts read, and their down_proj


@dataclass(frozen=True)
class ExpertRows:
    """What one expert reads: the numbers of its rows in files, and the name of each one's sample."""

    file: Path
    inner_file: Path
    numbers: NDArray[np.int64]
    samples: Sequence[str]

    def pieces(self) -> Iterator[tuple[Floats, Sequence[str]]]:
        """Its own inputs [n, H], at most `ROWS` at a time, and the names of their samples."""
        return self._pieces(self.file)

    def inner_pieces(self) -> Iterator[tuple[Floats, Sequence[str]]]:
        """The same of what its down_proj reads [n, F]."""
        return self._pieces(self.inner_file)

    def _pieces(self, file: Path) -> Iterator[tuple[Floats, Sequence[str]]]:
        rows = np.load(file, mmap_mode="r")
        for start in range(0, len(self.numbers), ROWS):
            piece = slice(start, start + ROWS)
            yield np.asarray(rows[self.numbers[piece]]), self.samples[piece]


@dataclass
class Routed:
    """What the router of one layer sent to its experts: rows f32 [T*k, H], already scaled by the score.

    `inner` f32 [T*k, F] is what their down_proj read, where it was asked for. Both lie in files.
    """

    file: Path
    rows: Any
    inner_file: Path
    inner: Any
    expert: NDArray[np.int64]  # [T*k]
    sample: NDArray[np.int64]  # [T*k]
    names: Sequence[str]  # of the samples

    def counts(self, experts: int) -> list[int]:
        """Tokens per expert [E]."""
        return [int(count) for count in np.bincount(self.expert, minlength=experts)]

    def of(self, expert: int) -> ExpertRows:
        """What `expert` reads."""
        numbers = np.flatnonzero(self.expert == expert)
        return ExpertRows(self.file, self.inner_file, numbers, [self.names[number] for number in self.sample[numbers]])


def expert_activation(rows: Floats, gate_up: Floats) -> Floats:
    """What an expert's down_proj reads: silu(gate) * up [n, F] of [n, H]; `gate_up` [2F, H] has halves gate|up."""
    gate, up = np.split(rows @ gate_up.T, 2, -1)
    with np.errstate(over="ignore"):  # exp(-gate) may overflow to inf, which makes the quotient the 0 it should be
        return np.asarray(gate / (1 + np.exp(-gate)) * up)


def expert_output(rows: Floats, gate_up: Floats, down: Floats) -> Floats:
    """What an expert adds to the residual stream [n, H] for its input [n, H]; `down` is [H, F]."""
    return expert_activation(rows, gate_up) @ down.T
