"""A calibrated form judged against its naive form."""

from __future__ import annotations

import pytest

from arriero.export.naive import recorded_rows, with_naive
from arriero.runtimes.report import ParityReport, judge


def report(kl: float) -> ParityReport:
    return ParityReport((judge("logits_kl_mean", kl, None, ""),), (), (), (), 1e-3)


@pytest.mark.parametrize(
    ("kl", "naive", "limit", "status"),
    [
        (0.01, 0.05, 0.5, "pass"),
        (0.03, 0.05, 0.5, "fail"),
        (0.03, 0.05, 0.7, "pass"),
        (0.06, 0.05, 5.0, "fail"),  # no threshold lets something worse than its naive form through
        (0.0, 0.0, 0.5, "pass"),
        (0.1, 0.0, 0.5, "fail"),
        (float("nan"), 0.05, 0.5, "fail"),
    ],
)
def test_what_does_not_beat_its_naive_form_fails(kl: float, naive: float, limit: float, status: str) -> None:
    judged = with_naive(report(kl), naive, {"kl_over_naive": limit})
    row = recorded_rows(judged)[-1]
    assert (row.metric, row.status) == ("kl_over_naive", status)
    assert bool(judged.failed) == (status == "fail")


def test_the_report_says_by_how_much() -> None:
    row = with_naive(report(0.01), 0.05, {}).rows[-1]
    assert row.value == pytest.approx(0.2)
    assert "5 times closer" in row.detail


def test_a_profile_that_does_not_calibrate_has_nothing_to_beat() -> None:
    assert with_naive(report(0.01), None, {"kl_over_naive": 0.5}) == report(0.01)
