"""A calibrated form judged against its RTN baseline."""

from __future__ import annotations

import pytest

from arriero.export.proof.rtn_baseline import recorded_rows, with_rtn_baseline
from arriero.runtimes.proof.report import ParityReport, judge


def report(kl: float) -> ParityReport:
    return ParityReport((judge("logits_kl_mean", kl, None, ""),), (), (), (), 1e-3)


@pytest.mark.parametrize(
    ("kl", "rtn", "limit", "status"),
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
def test_what_does_not_beat_its_rtn_baseline_fails(kl: float, rtn: float, limit: float, status: str) -> None:
    judged = with_rtn_baseline(report(kl), rtn, {"kl_over_rtn": limit})
    row = recorded_rows(judged)[-1]
    assert (row.metric, row.status) == ("kl_over_rtn", status)
    assert bool(judged.failed) == (status == "fail")


def test_the_report_says_by_how_much() -> None:
    row = with_rtn_baseline(report(0.01), 0.05, {}).rows[-1]
    assert row.value == pytest.approx(0.2)
    assert "5 times closer" in row.detail


def test_a_profile_that_does_not_calibrate_has_nothing_to_beat() -> None:
    assert with_rtn_baseline(report(0.01), None, {"kl_over_rtn": 0.5}) == report(0.01)
