"""The best choice of one option per group under a budget of bytes (a multiple-choice knapsack, solved greedily)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from arriero.errors import ArrieroError


@dataclass(frozen=True)
class Option:
    """What a group costs in one of its forms: bytes stored, and the error that the form makes."""

    bytes: int
    error: float


def choose(groups: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """For each of `groups` the number of an option, all together within `budget` bytes, for little total error.

    Every group starts with its smallest option; then, as long as one fits, the change that lowers the error most per
    byte is made. Raises ArrieroError when not even the smallest options fit.
    """
    chosen = [min(range(len(options)), key=lambda n: (options[n].bytes, options[n].error)) for options in groups]
    left = budget - sum(options[n].bytes for options, n in zip(groups, chosen, strict=True))
    if left < 0:
        raise ArrieroError(
            f"the smallest candidates take {budget - left:,} bytes",
            expected=f"at most {budget:,}, the profile's budget",
            remedy="Raise `choose.budget`, or add a smaller candidate",
        )
    while True:
        best: tuple[float, int, int] | None = None
        for group, options in enumerate(groups):
            now = options[chosen[group]]
            for number, option in enumerate(options):
                drop, price = now.error - option.error, option.bytes - now.bytes
                if drop <= 0 or price > left:
                    continue
                rate = drop / price if price > 0 else float("inf")
                if best is None or rate > best[0]:
                    best = (rate, group, number)
        if best is None:
            return chosen
        _, group, number = best
        left -= groups[group][number].bytes - groups[group][chosen[group]].bytes
        chosen[group] = number
