"""What a sampled record says of KL, at the vocabulary of the released models and on the exact figures' own terms.

Logits are drawn, not a model's: a few likely tokens over a long tail, as a language model's are, and a candidate that
is off by noise of several sizes. The reference's whole logits are at hand here, so that every estimate stands beside
the exact figure.
"""

from __future__ import annotations

import numpy as np
import pytest

from arriero.runtimes.proof import metrics
from arriero.runtimes.proof.logits import (
    DRAWN,
    HEAD,
    WHOLE_VOCABULARY,
    KlSums,
    SampledLogits,
    WholeLogits,
    keep_logits,
)

VOCABULARY = 202_048
TOKENS, SEEDS = 4, 60


def drawn_logits(seed: int, tokens: int = TOKENS, vocabulary: int = VOCABULARY) -> np.ndarray:
    """Logits whose tail beyond the head holds a few percent of the mass."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2.5, (tokens, vocabulary))
    likely = rng.integers(0, vocabulary, (tokens, 20))
    np.put_along_axis(logits, likely, rng.normal(15, 2, likely.shape), 1)
    return logits.astype(np.float32)


def off(reference: np.ndarray, noise: float, seed: int = 9) -> np.ndarray:
    """A candidate: independent noise, and the rare tokens' logits scaled as a coarse head does."""
    rng = np.random.default_rng(seed)
    return (reference * (1 + noise / 10) + rng.normal(0, noise, reference.shape)).astype(np.float32)


@pytest.fixture(scope="module")
def reference() -> np.ndarray:
    return drawn_logits(1)


@pytest.fixture(scope="module")
def records(reference: np.ndarray) -> list[SampledLogits]:
    return [SampledLogits.draw(reference, seed, "case") for seed in range(SEEDS)]


@pytest.mark.parametrize("noise", [1e-4, 0.01, 0.1, 0.5])
def test_the_estimate_is_unbiased_and_two_errors_cover_the_exact_kl(reference, records, noise):
    candidate = off(reference, noise)
    exact = float(metrics.kl_per_token(reference, candidate).mean())
    estimates = [record.figures(candidate, 1e-3).kl for record in records]
    means, errors = np.array([one.mean for one in estimates]), np.array([one.error for one in estimates])
    spread = means.std(ddof=1)
    # The mean of 60 independent estimates lies within three of its own standard errors of the exact figure.
    assert abs(means.mean() - exact) < 3 * spread / np.sqrt(SEEDS)
    # The stated error is the real one: a ratio of 1 give or take what 60 draws tell (9 %), three times over.
    assert 0.7 < np.sqrt((errors**2).mean()) / spread < 1.4
    covered = np.abs(means - exact) <= 2 * errors
    assert covered.mean() >= 0.9  # 95 % expected; below 90 % of 60 one time in forty
    assert (means + 2 * errors >= exact).mean() >= 0.9  # what gates rely on
    assert all(one.bound_mean <= exact * (1 + 1e-9) for one in estimates)
    assert len({one.bound_mean for one in estimates}) == 1, "the bound needs no draws"
    assert spread < 0.1 * exact, "and is worth stating"


def test_the_plain_mean_of_log_ratios_would_drown_a_small_kl(reference, records):
    """Why terms of second order are averaged: the same draws, both ways."""
    candidate = off(reference, 0.01)
    exact = float(metrics.kl_per_token(reference, candidate).sum())
    wide = candidate.astype(np.float64)
    log_q_sum = np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1, keepdims=True)) + wide.max(1, keepdims=True)
    plain = []
    for record in records:
        log_p = record.head_logits - record.log_sum[:, None]
        head = np.exp(log_p) * (log_p - (np.take_along_axis(wide, record.head_ids, 1) - log_q_sum))
        drawn = (record.drawn_logits - record.log_sum[:, None]) - (
            np.take_along_axis(wide, record.drawn_ids, 1) - log_q_sum
        )
        plain.append(float((head.sum(1) + np.exp(record.rest_log_sum - record.log_sum) * drawn.mean(1)).sum()))
    ours = [record.figures(candidate, 1e-3).kl.total for record in records]
    assert abs(np.mean(plain) - exact) < 3 * np.std(plain) / np.sqrt(SEEDS), "unbiased as well"
    assert np.std(plain) > 20 * np.std(ours)


def test_the_other_figures_at_that_vocabulary(reference, records):
    candidate = off(reference, 0.1)
    exact, sampled = (one.figures(candidate, 1e-3) for one in (WholeLogits(reference), records[0]))
    assert sampled.top == exact.top
    assert 0 < sampled.largest_error <= exact.largest_error
    assert sampled.sums.signal == pytest.approx(exact.sums.signal)
    sums = [record.sketched.errors(candidate) for record in records]
    within = [abs(one.relative_l2 - exact.sums.relative_l2) <= 2 * one.relative_l2_error for one in sums]
    assert np.mean(within) > 0.85  # 95 % expected; 85 % of 60 is more than three standard errors below
    assert sampled.sums.relative_l2_error < 0.05 * exact.sums.relative_l2
    assert exact.sums.relative_l2_error == 0.0 < sampled.sums.relative_l2_error
    same = records[0].figures(reference, 1e-3)
    assert (same.kl.total, same.kl.variance) == (pytest.approx(0, abs=1e-12), pytest.approx(0, abs=1e-20))
    assert (same.sums.noise, same.largest_error, same.top.real_flips) == (0.0, 0.0, 0)


def test_what_is_kept_is_what_it_says(reference, records):
    kept = records[0]
    np.testing.assert_array_equal(kept.head_ids[:, 0], reference.argmax(1))
    assert (np.diff(kept.head_logits, axis=1) <= 0).all()
    np.testing.assert_array_equal(kept.head_logits[:, -1], np.sort(reference, 1)[:, -HEAD])
    wide = reference.astype(np.float64)
    np.testing.assert_allclose(kept.log_sum, np.log(np.exp(wide).sum(1)), rtol=1e-12)
    for token, ids in enumerate(kept.drawn_ids):
        assert not set(ids) & set(kept.head_ids[token])
        np.testing.assert_array_equal(kept.drawn_logits[token], reference[token, ids])
    again = SampledLogits.draw(reference, 0, "case")
    np.testing.assert_array_equal(again.drawn_ids, kept.drawn_ids)
    assert (records[1].drawn_ids != kept.drawn_ids).any()


def test_ids_are_drawn_as_often_as_the_reference_says():
    """By chi-square over a tail of 44 ids and 64,000 draws."""
    logits = np.repeat(drawn_logits(5, 1, HEAD + 44), 1000, 0)
    kept = SampledLogits.draw(logits, 3, "case")
    tail = np.setdiff1d(np.arange(HEAD + 44), kept.head_ids[0])
    share = np.exp(logits[0, tail].astype(np.float64))
    expected = share / share.sum() * kept.drawn_ids.size
    counts = np.array([(kept.drawn_ids == token).sum() for token in tail])
    chi = float(((counts - expected) ** 2 / expected).sum())
    assert counts.sum() == 1000 * DRAWN
    assert chi < 43 + 4 * np.sqrt(2 * 43)


def test_a_candidate_that_forgets_a_rare_token_is_seen_in_the_mean():
    """A tail token that the candidate holds impossible makes the KL large; the bound alone would hardly see it."""
    reference = drawn_logits(7, 200, 5000)
    candidate = reference.copy()
    kept = SampledLogits.draw(reference, 1, "case")
    rest = reference.copy()
    np.put_along_axis(rest, kept.head_ids, -np.inf, 1)
    np.put_along_axis(candidate, rest.argmax(1)[:, None], -40.0, 1)
    exact = metrics.kl_per_token(reference, candidate).mean()
    found = kept.figures(candidate, 1e-3).kl
    assert abs(found.mean - exact) < 3 * found.error
    assert found.bound_mean < exact / 3


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_never_looks_close(bad):
    reference = drawn_logits(2, 3, 5000)
    candidate = reference.copy()
    candidate[1, 17] = bad
    figures = SampledLogits.draw(reference, 1, "case").figures(candidate, 1e-3)
    assert not metrics.meets(figures.kl.mean, 1e9, "max") or bad == -np.inf  # an impossible tail token costs its mass
    assert not metrics.meets(figures.sums.relative_l2, 1e9, "max")
    assert figures.top.nonfinite == 1


def test_small_vocabularies_are_kept_whole():
    whole, sampled = (keep_logits(drawn_logits(3, 2, WHOLE_VOCABULARY + more), 1, "case") for more in (0, 1))
    assert isinstance(whole, WholeLogits)
    assert isinstance(sampled, SampledLogits)
    with pytest.raises(metrics.ShapesDiffer):
        sampled.figures(drawn_logits(3, 2, WHOLE_VOCABULARY), 1e-3)
    with pytest.raises(ValueError, match="kept whole"):
        SampledLogits.draw(drawn_logits(3, 2, HEAD), 1, "case")


def test_sums_add_up():
    parts = KlSums(1.0, 0.04, 0.5, 10), KlSums(3.0, 0.12, 2.5, 10)
    both = parts[0] + parts[1]
    assert (both.mean, both.error, both.bound_mean) == (0.2, pytest.approx(0.02), 0.15)
