"""Standard errors over drawn cases, held against how figures scatter when cases are drawn again and again."""

from __future__ import annotations

import math

import numpy as np
import pytest

from arriero.runtimes.proof.sampling_error import mean_error, quantile_errors, ratio_error, told

INF = float("inf")


def test_the_error_of_a_mean_over_tokens_is_what_other_cases_would_differ_by():
    draw = np.random.default_rng(0)

    def cases(count):
        """Of very different lengths; the tokens of one are alike, so that taking each for itself would be far off."""
        sizes = draw.integers(2, 60, count)
        return [draw.exponential() * (1 + 0.1 * draw.standard_normal(size)) for size in sizes]

    drawn = [cases(50) for _ in range(400)]
    spread = np.std([np.concatenate(one).mean() for one in drawn])
    said = np.mean([mean_error(one) for one in drawn])
    assert said == pytest.approx(spread, rel=0.12)
    assert mean_error(drawn[0][:1]) is None
    assert math.isnan(mean_error([np.array([INF, 1.0]), np.array([1.0])]))


def test_the_error_of_quantiles_is_how_they_scatter():
    draw = np.random.default_rng(3)

    def cases(count: int) -> list[np.ndarray]:
        """Tokens of a case are alike."""
        return [draw.exponential(draw.exponential(), draw.integers(20, 60)) for _ in range(count)]

    shares = [0.5, 0.99]
    drawn = [cases(60) for _ in range(120)]
    spread = np.std([np.quantile(np.concatenate(one), shares) for one in drawn], axis=0)
    errors = np.mean([quantile_errors(one, shares) for one in drawn[:40]], axis=0)
    assert errors == pytest.approx(spread, rel=0.25)
    assert quantile_errors(drawn[0], shares) == quantile_errors(drawn[0], shares)
    assert quantile_errors(drawn[0][:1], shares) is None
    broken = quantile_errors([np.array([INF, INF]), np.array([INF, 1.0])], shares)
    assert broken is not None
    assert math.isnan(broken[1])


def test_the_error_of_a_share_knows_that_a_cases_choices_are_alike():
    draw = np.random.default_rng(4)

    def flips(count: int) -> tuple[np.ndarray, np.ndarray]:
        sizes = draw.integers(20, 60, count)
        return draw.binomial(sizes, draw.beta(0.2, 5, count)), sizes

    drawn = [flips(80) for _ in range(300)]
    spread = np.std([flipped.sum() / sizes.sum() for flipped, sizes in drawn])
    assert np.mean([ratio_error(*one) for one in drawn]) == pytest.approx(spread, rel=0.15)
    assert ratio_error([1], [5]) is None
    assert math.isnan(ratio_error([0, 0], [0, 0]) or 0.0)


def test_an_error_is_told_where_there_is_one():
    assert told(0.01234, 24, "nat") == "; ± 0.012 nat, standard error over 24 cases"
    assert told(0.01234, 24, "share") == "; ± 1.2 points, standard error over 24 cases"
    assert told(None, 1, "nat") == told(math.nan, 3, "nat") == told(0.0, 200, "share") == ""
