"""A calibrated form judged against its RTN baseline."""

from __future__ import annotations

import pytest

from arriero.runtimes.proof.logits import KlSums
from arriero.runtimes.proof.report import ParityReport
from arriero.runtimes.proof.rows import judge
from arriero.runtimes.proof.rtn_baseline import recorded_rows, with_rtn_baseline

TOKENS = 50


def kl(mean: float, error: float = 0.0) -> KlSums:
    return KlSums(mean * TOKENS, (error * TOKENS) ** 2, mean * TOKENS, TOKENS)


def report(mean: float) -> ParityReport:
    return ParityReport((judge("logits_kl_mean", mean, None, ""),), (), (), (), 1e-3, "generated")


@pytest.mark.parametrize(
    ("mean", "rtn", "limit", "status"),
    [
        (0.01, 0.05, 0.5, "pass"),
        (0.03, 0.05, 0.5, "fail"),
        (0.03, 0.05, 0.7, "pass"),
        (0.06, 0.05, 5.0, "fail"),  # no threshold lets something worse than its RTN baseline through
        (0.0, 0.0, 0.5, "pass"),
        (0.1, 0.0, 0.5, "fail"),
        (float("nan"), 0.05, 0.5, "fail"),
    ],
)
def test_what_does_not_beat_its_rtn_baseline_fails(mean: float, rtn: float, limit: float, status: str) -> None:
    judged = with_rtn_baseline(report(mean), kl(mean), kl(rtn), {"kl_over_rtn": limit})
    row = recorded_rows(judged)[-1]
    assert (row.metric, row.status) == ("kl_over_rtn", status)
    assert bool(judged.failed) == (status == "fail")


def test_the_report_says_by_how_much() -> None:
    row = with_rtn_baseline(report(0.01), kl(0.01), kl(0.05), {}).rows[-1]
    assert row.value == pytest.approx(0.2)
    assert "5 times closer" in row.detail


def test_an_estimate_has_to_beat_it_by_two_standard_errors() -> None:
    """0.024 of 0.05 is below one half, and 0.024 give or take 0.001 is not surely so."""
    surely, perhaps = (
        with_rtn_baseline(report(0.024), kl(0.024, error), kl(0.05), {"kl_over_rtn": 0.5}).rows[-1]
        for error in (0.0002, 0.001)
    )
    assert perhaps.error == pytest.approx(0.02)
    assert (surely.status, perhaps.status) == ("pass", "fail")
