"""The paired test against enumeration of every outcome, its statistic by brute force, and McNemar's."""

from __future__ import annotations

import math

import numpy as np
import pytest

from arriero.runtimes.proof.paired import POWER, Pairs, cases_needed, smallest_shown


def chance_of_exceeding(count: int, lost: float, gained: float, limit: float) -> float:
    """The probability, summed over all outcomes, that `count` cases with these true shares exceed `limit`."""
    log = [math.lgamma(k + 1) for k in range(count + 1)]
    same, total = 1.0 - lost - gained, 0.0
    for b in range(count + 1):
        for c in range(count + 1 - b):
            shares = ((b, lost), (c, gained), (count - b - c, same))
            if any(share <= 0 < k for k, share in shares):
                continue
            ways = log[count] - log[b] - log[c] - log[count - b - c]
            weight = math.exp(ways + sum(k * math.log(share) for k, share in shares if k))
            if weight > 1e-12 and Pairs(count, b, c).exceeds(limit):
                total += weight
    return total


@pytest.mark.parametrize(("count", "limit"), [(40, 0.005), (40, 0.0), (40, 0.05), (120, 0.02), (200, 0.005)])
@pytest.mark.parametrize("gained", [0.0, 0.01, 0.05])
def test_a_drop_at_the_limit_rarely_fails(count: int, limit: float, gained: float) -> None:
    """The score test is asymptotic: summed over all outcomes its error is 6.8 % at most where it promises 5 %."""
    assert chance_of_exceeding(count, limit + gained, gained, limit) < 0.07


@pytest.mark.parametrize(("count", "limit", "drop"), [(40, 0.005, 0.25), (200, 0.005, 0.06), (200, 0.02, 0.1)])
def test_a_clearly_worse_candidate_fails(count: int, limit: float, drop: float) -> None:
    assert chance_of_exceeding(count, drop + 0.01, 0.01, limit) > 0.9


@pytest.mark.parametrize("limit", [0.02, 0.05])
def test_the_cases_needed_have_the_power_they_are_for(limit: float) -> None:
    drop = 2 * limit
    count = cases_needed(limit, drop)
    assert chance_of_exceeding(count, 1.5 * drop, 0.5 * drop, limit) == pytest.approx(POWER, abs=0.05)
    assert chance_of_exceeding(count // 3, 1.5 * drop, 0.5 * drop, limit) < 0.6


def score(count: int, lost: int, gained: int, limit: float) -> float:
    """Tango's statistic with the nuisance share taken from the likelihood itself, on a fine grid."""
    shares = np.linspace(max(0.0, -limit), (1 - limit) / 2, 2_000_001)[1:-1]
    likelihood = lost * np.log(shares + limit) + (count - lost - gained) * np.log(1 - 2 * shares - limit)
    likelihood += gained * np.log(shares) if gained else 0.0
    share = shares[np.argmax(likelihood)]
    return (lost - gained - count * limit) / math.sqrt(count * (2 * share + limit * (1 - limit)))


@pytest.mark.parametrize(("count", "lost", "gained"), [(40, 3, 0), (200, 12, 5), (200, 2, 9), (50, 0, 0)])
def test_bounds_are_where_the_statistic_is_the_quantile(count: int, lost: int, gained: int) -> None:
    low, high = Pairs(count, lost, gained).interval()
    assert -1 < low <= (lost - gained) / count <= high < 1
    assert score(count, lost, gained, high) == pytest.approx(-1.6448536, abs=1e-3)
    if lost:
        assert score(count, lost, gained, low) == pytest.approx(1.6448536, abs=1e-3)


def test_at_no_limit_it_is_mcnemars_test() -> None:
    for lost, gained in ((2, 0), (3, 0), (9, 3), (10, 3), (30, 20)):
        assert Pairs(100, lost, gained).exceeds(0.0) == ((lost - gained) / math.sqrt(lost + gained) > 1.6448536)


def test_one_lost_answer_of_few_does_not_fail_half_a_point() -> None:
    assert not Pairs(40, 1, 0).exceeds(0.005)
    assert not Pairs(200, 2, 0).exceeds(0.005)
    assert Pairs(40, 1, 0).drop > 0.005


@pytest.mark.parametrize("count", [1, 2, 3, 5, 40, 200, 1000])
@pytest.mark.parametrize("limit", [0.0, 0.005, 0.02, 0.5, 0.99])
def test_every_limit_below_one_can_be_broken(count: int, limit: float) -> None:
    assert Pairs(count, count, 0).exceeds(limit)
    assert not Pairs(count, 0, 0).exceeds(limit)
    assert not Pairs(count, 0, count).exceeds(limit)
    shown = smallest_shown(count, limit)
    if shown is not None:
        lost = round(shown * count)
        assert Pairs(count, lost, 0).exceeds(limit)
        assert not Pairs(count, lost - 1, 0).exceeds(limit)


def test_no_drop_exceeds_one() -> None:
    assert not Pairs(5, 5, 0).exceeds(1.0)


def test_what_no_number_of_cases_finds_is_refused() -> None:
    for limit, drop in ((0.02, 0.02), (0.4, 0.8)):
        with pytest.raises(ValueError, match="no number of cases"):
            cases_needed(limit, drop)
