"""How many tokens of a prompt are read between two decode steps, so that whoever decodes meanwhile hardly waits.

A piece of a prompt is read between two decode steps, beside the rows of one, or in parts: where a step can be left
between parts of its layers, decode steps are taken there ("layered prefill": Lee et al. 2025, "From Tokens to Layers").
Small pieces of a prompt read most experts for a few tokens each; a large one reads them once.
"""

from __future__ import annotations

import time

from arriero.traits import PREFILL_PIECE

# A piece, or the parts of one between two decode steps, may take so many times as long as such a step: the gap between
# the others' tokens is then 2.3 steps, and a prompt whose pieces are as quick as large ones takes 1.77 times as long
# as alone.
STEPS_PER_PIECE = 1.3
LEAST = 8  # tokens of a piece: below it the weights are read for too few of them
GRAIN = 2  # what a piece grows by: in coarser steps it would fall short of what it may take by up to half
NEWEST = 0.25  # the newest measurement's share of what is expected


class Pace:
    """Measures pieces and decode steps, and says how large the next piece may be."""

    def __init__(self) -> None:
        self._token_s: float | None = None
        self._step_s: float | None = None
        self._decoded = time.perf_counter()  # when the last decode step ended

    def read(self, tokens: int, seconds: float) -> None:
        """A piece of `tokens` took `seconds`."""
        self._token_s = _expected(self._token_s, seconds / tokens)

    def read_beside(self, tokens: int, seconds: float) -> None:
        """A piece of `tokens` and one token of each row that decodes, in one step, took `seconds`."""
        self.read(tokens, max(seconds - (self._step_s or 0.0), 0.0))

    def decoded(self, seconds: float) -> None:
        """A decode step took `seconds`, and ended now."""
        self._step_s = _expected(self._step_s, seconds)
        self._decoded = time.perf_counter()

    def piece(self) -> int:
        """Tokens of the next piece while others decode: a multiple of GRAIN."""
        if self._token_s is None or self._step_s is None:
            return LEAST
        tokens = int(STEPS_PER_PIECE * self._step_s / max(self._token_s, 1e-9))
        return min(max(tokens // GRAIN * GRAIN, LEAST), PREFILL_PIECE)

    def is_due(self, seconds: float) -> bool:
        """Whether the next decode step would come too late after so many `seconds` more of something else."""
        return self._step_s is None or seconds > self._wait()

    def rest(self) -> float:
        """Seconds to when the next decode step is due; 0 where it is, or nothing is known."""
        return max(self._wait(), 0.0)

    def _wait(self) -> float:
        return self._decoded + STEPS_PER_PIECE * (self._step_s or 0.0) - time.perf_counter()


def _expected(before: float | None, measured: float) -> float:
    return measured if before is None else (1 - NEWEST) * before + NEWEST * measured
