"""Paired answers before and after: whether n cases show a drop larger than a limit, and what they could have shown.

Both sides answer the same cases, so that only the cases on which they differ say anything: `lost` were right before and
are wrong now, `gained` the reverse. The true drop is the share of cases lost minus that gained. A score test holds it
against a limit (T. Tango, Equivalence test and confidence interval for the difference in proportions for the
paired-sample design, Statistics in Medicine 17, 1998, 891-908); at a limit of 0 it is McNemar's test. It is asymptotic:
summed over all outcomes, its error is at most 7 % where it promises 5 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

CONFIDENCE = 0.95  # one-sided, of a verdict and of each end of an interval
POWER = 0.8  # with which `cases_needed` finds what it is asked for


@dataclass(frozen=True)
class Pairs:
    """Answers to `count` cases, of which `lost` were right before only and `gained` are right now only."""

    count: int
    lost: int
    gained: int

    @property
    def drop(self) -> float:
        """The measured drop of accuracy."""
        return (self.lost - self.gained) / self.count

    def exceeds(self, limit: float) -> bool:
        """Whether the cases show, at CONFIDENCE, that the true drop is larger than `limit`.

        Where they could show it by no outcome, the measured drop decides, so that every limit can be broken.
        """
        if smallest_shown(self.count, limit) is None:
            return self.drop > limit
        return _score(self.count, self.lost, self.gained, limit) > _z(CONFIDENCE)

    def interval(self) -> tuple[float, float]:
        """Bounds of the true drop: each is passed with a probability of 1 - CONFIDENCE at most."""
        z = _z(CONFIDENCE)

        def excess(limit: float) -> float:
            return _score(self.count, self.lost, self.gained, limit)

        low = _crossing(lambda limit: excess(limit) > z, -1.0, self.drop)
        return low, _crossing(lambda limit: excess(limit) >= -z, self.drop, 1.0)


def smallest_shown(count: int, limit: float) -> float | None:
    """The smallest drop, nothing gained, by which `count` cases exceed `limit`; None where not even all lost do."""
    z = _z(CONFIDENCE)
    if not _score(count, count, 0, limit) > z:
        return None
    low, high = 0, count  # the score grows with what is lost
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _score(count, middle, 0, limit) > z else (middle + 1, high)
    return low / count


def cases_needed(limit: float, drop: float) -> int:
    """How many cases find a true `drop` larger than `limit` with a probability of POWER.

    As a rule of experience the rounded model loses three answers for each that it gains.
    """
    lost, gained = 1.5 * drop, 0.5 * drop
    if not limit < drop or lost + gained > 1:
        raise ValueError(f"no number of cases finds a drop of {drop} beside a limit of {limit}")
    # the score's spread where the true drop is the limit, and where it is `drop`; both for one case
    below = math.sqrt(_variance(1.0, lost, gained, limit))
    above = math.sqrt(lost + gained - drop**2)
    return math.ceil(((_z(CONFIDENCE) * below + _z(POWER) * above) / (drop - limit)) ** 2)


def _z(share: float) -> float:
    return NormalDist().inv_cdf(share)


def _variance(count: float, lost: float, gained: float, limit: float) -> float:
    """The variance of lost - gained if the true drop is `limit`, at the likeliest share of gained cases for that."""
    a = 2.0 * count
    b = (2.0 * count - lost + gained) * limit - lost - gained
    c = -gained * limit * (1.0 - limit)
    share = (math.sqrt(max(b * b - 4.0 * a * c, 0.0)) - b) / (2.0 * a)
    return max(count * (2.0 * share + limit * (1.0 - limit)), 0.0)


def _score(count: int, lost: int, gained: int, limit: float) -> float:
    """How many standard errors the measured drop lies above `limit`."""
    excess = lost - gained - count * limit
    spread = math.sqrt(_variance(count, lost, gained, limit))
    if spread > 1e-12 * count:
        return excess / spread
    return 0.0 if abs(excess) <= 1e-9 * count else math.copysign(math.inf, excess)


def _crossing(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The point between `low`, where `holds`, and `high`, where it no longer does."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return (low + high) / 2
