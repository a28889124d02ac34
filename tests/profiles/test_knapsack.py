"""The greedy choice under a budget against the best of all choices."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from arriero.errors import ArrieroError
from arriero.profiles.knapsack import Option, choose


def draw(seed: int, groups: int = 6) -> list[list[Option]]:
    """Groups with three forms each: the more bytes, the less error, at very different rates."""
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(groups):
        sizes, errors = np.sort(rng.integers(10, 60, 3)), np.sort(10.0 ** rng.uniform(-6, -2, 3))[::-1]
        drawn.append([Option(int(size), float(error)) for size, error in zip(sizes, errors, strict=True)])
    return drawn


def total(groups: list[list[Option]], chosen: list[int] | tuple[int, ...]) -> tuple[int, float]:
    options = [options[number] for options, number in zip(groups, chosen, strict=True)]
    return sum(option.bytes for option in options), sum(option.error for option in options)


@pytest.mark.parametrize("seed", range(20))
def test_it_stays_within_the_budget_and_near_the_best_choice(seed: int) -> None:
    groups = draw(seed)
    least = sum(options[0].bytes for options in groups)
    most = sum(options[-1].bytes for options in groups)
    for budget in (least, (least + most) // 2, most):
        size, error = total(groups, choose(groups, budget))
        assert size <= budget
        fitting = [total(groups, one) for one in product(range(3), repeat=len(groups))]
        best = min(error for size, error in fitting if size <= budget)
        worst = max(error for size, error in fitting if size <= budget)
        assert error - best <= 0.1 * (worst - best)


def test_more_budget_never_makes_it_worse_on_the_whole() -> None:
    groups = draw(3)
    smallest, largest = choose(groups, 360), choose(groups, 10_000)
    assert largest == [2] * 6
    assert total(groups, largest)[1] <= total(groups, smallest)[1]


def test_bytes_that_buy_nothing_are_not_spent() -> None:
    assert choose([[Option(10, 0.1), Option(20, 0.1), Option(30, 0.2)]], 100) == [0]


def test_a_budget_below_the_smallest_candidates_is_refused() -> None:
    with pytest.raises(ArrieroError, match="the smallest candidates take 30 bytes"):
        choose([[Option(10, 1.0)], [Option(20, 1.0)]], 29)
