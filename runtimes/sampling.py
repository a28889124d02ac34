"""From logits to the next token: greedy, or drawn after temperature, top-k and top-p, in that order."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real
from typing import TypedDict

import numpy as np

from arriero.errors import ArrieroError
from arriero.runtimes.backend import Floats

_ALL = "Leave it out to draw from every token"


class SamplingSettings(TypedDict, total=False):
    """The fields of `Sampling` as keyword arguments, for who would rather not make one."""

    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int | None


@dataclass(frozen=True)
class Sampling:
    """How to choose a token. `temperature` 0 takes the likeliest; the same `seed` draws the same tokens again."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, kind in (("temperature", Real), ("top_k", Integral), ("top_p", Real), ("seed", Integral)):
            value = getattr(self, name)
            if not isinstance(value, kind) and (value is not None or name == "temperature"):
                raise ArrieroError(
                    f"{name} is {value!r}", expected="a whole number" if kind is Integral else "a number"
                )
        if not self.temperature >= 0 or self.temperature == float("inf"):
            raise ArrieroError(
                f"temperature is {self.temperature}", expected="a number of at least 0", remedy="0 is greedy"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ArrieroError(f"top_k is {self.top_k}", expected="at least 1", remedy=_ALL)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ArrieroError(f"top_p is {self.top_p}", expected="above 0 and at most 1", remedy=_ALL)
        if self.seed is not None and self.seed < 0:
            raise ArrieroError(f"seed is {self.seed}", expected="at least 0", remedy="Leave it out for other draws")

    def generator(self) -> np.random.Generator:
        """Give a fresh stream of random numbers for one answer."""
        return np.random.default_rng(self.seed)

    def choose(self, logits: Floats, random: np.random.Generator) -> int:
        """Choose a token id from `logits` [V]; ties go to the lowest id."""
        if self.temperature == 0 or self.top_k == 1:
            return int(np.argmax(logits))
        # float64 keeps the cumulative sum of a large vocabulary exact enough for top-p and for `searchsorted`
        order = np.argsort(-logits, kind="stable")[: self.top_k]
        likeliest_first = logits[order].astype(np.float64)
        with np.errstate(over="ignore"):  # next to no temperature leaves the others no chance
            weights = np.exp((likeliest_first - likeliest_first[0]) / self.temperature)
        cumulative = np.cumsum(weights / weights.sum())
        if self.top_p is not None:
            # the smallest head whose probability reaches top_p
            kept = int(np.searchsorted(cumulative, self.top_p)) + 1
            cumulative = cumulative[:kept]
        drawn = np.searchsorted(cumulative, random.random() * cumulative[-1], side="right")
        return int(order[min(int(drawn), len(cumulative) - 1)])
