"""The metrics against numbers worked out by hand, and against broken inputs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from arriero.runtimes.proof import metrics
from arriero.runtimes.proof.metrics import Agreement, ErrorSums

INF, NAN = math.inf, math.nan


def test_relative_l2_and_snr_of_a_hand_worked_pair():
    reference, candidate = np.array([3.0, 4.0]), np.array([3.0, 4.5])
    assert metrics.relative_l2(reference, candidate) == pytest.approx(0.1)  # 0.5 / 5
    assert metrics.snr_db(reference, candidate) == pytest.approx(20.0)  # 10 log10(25 / 0.25)
    assert metrics.max_abs_error(reference, candidate) == 0.5


def test_identical_arrays_have_no_error_and_infinite_snr():
    same = np.array([1.0, -2.0])
    assert metrics.relative_l2(same, same) == 0.0
    assert metrics.snr_db(same, same) == INF
    assert metrics.max_abs_error(same, same) == 0.0


def test_a_reference_of_zeros():
    zeros = np.zeros(2)
    assert metrics.relative_l2(zeros, zeros) == 0.0
    assert metrics.relative_l2(zeros, np.ones(2)) == INF
    assert metrics.snr_db(zeros, np.ones(2)) == -INF


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("side", [0, 1])
def test_numbers_that_are_not_finite_never_meet_a_threshold(bad, side):
    pair = [np.array([[1.0, 2.0], [3.0, 4.0]], np.float32) for _ in range(2)]
    pair[side][1, 0] = bad
    assert not metrics.meets(metrics.relative_l2(*pair), 1e9, "max")
    assert not metrics.meets(metrics.snr_db(*pair), -1e9, "min")
    assert not metrics.meets(metrics.max_abs_error(*pair), 1e9, "max")
    assert not metrics.meets(metrics.kl_per_token(*pair).mean(), 1e9, "max")
    assert math.isnan(metrics.same_top_token(*pair).fraction)


def test_both_sides_nan_at_the_same_place_is_no_agreement():
    both = np.array([[NAN, 1.0]])
    assert math.isnan(metrics.max_abs_error(both, both))
    assert math.isnan(metrics.same_top_token(both, both).fraction)
    assert metrics.same_top_token(both, both).real_flips == 1


def test_sums_of_pieces_are_the_sums_of_the_whole():
    rng = np.random.default_rng(0)
    reference, candidate = rng.normal(size=(2, 6, 5))
    pieces = ErrorSums.of(reference[:2], candidate[:2]) + ErrorSums.of(reference[2:], candidate[2:])
    assert pieces.relative_l2 == pytest.approx(metrics.relative_l2(reference, candidate))
    assert pieces.max_abs == metrics.max_abs_error(reference, candidate)
    assert pieces.count == 30


@pytest.mark.parametrize("nan_first", [True, False])
def test_nan_survives_adding_in_either_order(nan_first):
    one, other = ErrorSums.of(np.ones(1), np.array([NAN])), ErrorSums.of(np.ones(1), np.ones(1))
    total = one + other if nan_first else other + one
    assert math.isnan(total.max_abs)
    assert math.isnan(total.relative_l2)


def test_float16_inputs_do_not_overflow():
    big = np.full(4, 60000, np.float16)
    assert metrics.relative_l2(big, big * np.float16(0.5)) == pytest.approx(0.5)


def test_kl_of_a_hand_worked_pair():
    # p = (1/2, 1/2), q = (1/4, 3/4): 0.5 ln 2 + 0.5 ln(2/3)
    reference, candidate = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    assert metrics.kl_per_token(reference, candidate)[0] == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


def test_kl_ignores_a_shift_of_all_logits_and_is_exact_for_large_ones():
    logits = np.array([[1000.0, 999.0, -1000.0]], np.float32)
    assert metrics.kl_per_token(logits, logits + 64)[0] == pytest.approx(0.0, abs=1e-12)


def test_kl_over_more_rows_than_one_block(monkeypatch):
    rng = np.random.default_rng(1)
    reference, candidate = rng.normal(size=(2, 11, 4))
    monkeypatch.setattr(metrics, "BYTES_AT_ONCE", 4 * 4 * 8)
    assert [(rows.start, rows.stop) for rows in metrics.row_blocks(reference)] == [(0, 4), (4, 8), (8, 12)]
    monkeypatch.setattr(metrics, "BYTES_AT_ONCE", 1)
    assert len(list(metrics.row_blocks(reference))) == 11
    monkeypatch.setattr(metrics, "BYTES_AT_ONCE", 4 * 4 * 8)
    whole = metrics.kl_per_token(reference, candidate)
    assert whole[-1] == metrics.kl_per_token(reference[-1:], candidate[-1:])[0]
    assert (whole >= 0).all()


def test_same_top_token_counts_near_ties_apart():
    reference = np.array([[5.0, 1.0, 0.0], [2.0, 1.9995, 0.0], [2.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    candidate = np.array([[4.0, 1.0, 0.0], [1.0, 1.9995, 0.0], [0.0, 1.0, 0.5], [1.0, 0.9, 0.0]])
    found = metrics.same_top_token(reference, candidate)
    assert found == Agreement(tokens=4, near_ties=2, near_tie_flips=1, real_flips=1)
    assert found.fraction == 0.5
    assert str(found) == "1 of 2 clear choices differ; apart: 1 of 2 near ties"


def test_only_near_ties_is_not_measured_rather_than_perfect():
    assert metrics.same_top_token(np.zeros((3, 2)), np.ones((3, 2))).fraction is None


def test_the_margin_is_the_references_not_the_candidates():
    reference, candidate = np.array([[5.0, 1.0]]), np.array([[1.0, 1.0001]])
    assert metrics.same_top_token(reference, candidate).fraction == 0.0


def test_router_agreement_is_of_sets_and_of_all_experts():
    reference, candidate = np.array([[3, 1], [2, 0], [4, 5]]), np.array([[1, 3], [2, 1], [4, 5]])
    assert metrics.router_agreement(reference, candidate).fraction == pytest.approx(2 / 3)


def test_router_near_ties_come_from_the_margin():
    reference, candidate = np.array([[1], [2], [3]]), np.array([[1], [0], [0]])
    found = metrics.router_agreement(reference, candidate, margin=np.array([1.0, 1e-5, 0.5]))
    assert found == Agreement(tokens=3, near_ties=1, near_tie_flips=1, real_flips=1)


@pytest.mark.parametrize(
    ("reference", "candidate", "share"),
    [([1, 2, 3, 4], [1, 2, 9, 4], 0.5), ([], [], 1.0), ([1], [], 0.0), ([1, 2], [1, 2, 3, 4], 0.5), ([7], [7], 1.0)],
)
def test_common_prefix(reference, candidate, share):
    assert metrics.common_prefix(reference, candidate) == share


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        # R. G. Newcombe, Statistics in Medicine 17, 1998, 857-872, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_intervals_of_an_accuracy_stay_honest_at_its_ends(right, count, low, high):
    assert metrics.accuracy_interval(right, count) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("value", "threshold", "direction", "met"),
    [
        (0.1, 0.1, "max", True),
        (0.2, 0.1, "max", False),
        (0.1, 0.1, "min", True),
        (0.0, 0.1, "min", False),
        (INF, 40.0, "min", True),
        (-INF, 0.0, "max", True),
        (INF, INF, "max", False),
        (NAN, 0.0, "min", False),
    ],
)
def test_meets(value, threshold, direction, met):
    assert metrics.meets(value, threshold, direction) is met


@pytest.mark.parametrize("function", [metrics.relative_l2, metrics.kl_per_token, metrics.router_agreement])
def test_different_shapes_are_refused_not_broadcast(function):
    with pytest.raises(metrics.ShapesDiffer, match=r"reference \[2, 2\], candidate \[1, 2\]"):
        function(np.ones((2, 2)), np.ones((1, 2)))
