"""What a report says of a bundle's RTN baseline: its own profile, rounded to nearest, as only a build can measure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from arriero.runtimes.proof.logits import KlSums
from arriero.runtimes.proof.report import ParityReport
from arriero.runtimes.proof.rows import Row, judge
from arriero.thresholds import OVER_RTN

RTN_KL = "rtn_kl_mean"


def with_rtn_baseline(report: ParityReport, kl: KlSums, rtn: KlSums, thresholds: Mapping[str, float]) -> ParityReport:
    """`report` with the rows that say by how much it beats its RTN baseline.

    A threshold above 1 counts as 1: what is worse than its RTN baseline does not ship. The errors of both KLs add up as
    if they were independent; they are of the same drawn ids, so the ratio is known better than that.
    """
    over, error = (kl.mean / rtn.mean if rtn.mean > 0 else float(kl.mean > 0)), 0.0
    if kl.error or rtn.error:
        error = over * float(np.hypot(kl.error / kl.mean, rtn.error / rtn.mean))
    detail = (
        f"calibrated {kl.mean:.3g} nat, RTN {rtn.mean:.3g} nat: {1 / over:.3g} times closer" if over else "both exact"
    )
    rows = (
        judge(RTN_KL, rtn.mean, None, "the same tensors, bits and blocks, rounded to nearest", rtn.error),
        judge(OVER_RTN, over, min(1.0, thresholds.get(OVER_RTN, 1.0)), detail, error),
    )
    return replace(report, rows=(*report.rows, *rows))


def recorded_rows(report: ParityReport) -> tuple[Row, ...]:
    """The rows of a build's report that stand on its own cases, and say nothing of others."""
    return tuple(row for row in report.rows if row.metric in (OVER_RTN, RTN_KL))
