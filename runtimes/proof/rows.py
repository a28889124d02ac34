"""The rows of a parity report: how a value is held against its threshold."""

from __future__ import annotations

import math
from dataclasses import dataclass

from arriero.runtimes.proof import metrics
from arriero.runtimes.proof.paired import CONFIDENCE, Pairs, smallest_shown
from arriero.thresholds import METRICS, Metric

ERRORS = 2  # standard errors by which an estimate has to keep away from its threshold


@dataclass(frozen=True)
class Row:
    """One line of the report. `value` None: not measured, `detail` says why; `status`: pass, fail or info.

    `error` is the standard error of an estimate, 0 of what is exact.
    """

    metric: str
    value: float | None
    threshold: float | None
    status: str
    detail: str
    error: float = 0.0

    def __post_init__(self) -> None:
        if self.metric.partition(".")[0] not in METRICS:
            raise ValueError(f"no such parity metric: {self.metric}")

    @property
    def about(self) -> Metric:
        """The metric's meaning; `task_accuracy_drop.recall` shares that of `task_accuracy_drop`."""
        return METRICS[self.metric.partition(".")[0]]

    @property
    def title(self) -> str:
        """The metric's title, with the family if the row is of one."""
        family = self.metric.partition(".")[2]
        return f"{self.about.title}: {family}" if family else self.about.title


def judge_drop(metric: str, pairs: Pairs, threshold: float | None, detail: str) -> Row:
    """The row of a drop of accuracy: it fails where the cases show a larger one than `threshold`."""
    low, high = (100 * bound for bound in pairs.interval())
    detail += f"; a drop from {low:.1f} to {high:.1f} points (each end at {100 * CONFIDENCE:.0f} % confidence)"
    if threshold is None:
        return Row(metric, pairs.drop, None, "info", detail)
    smallest = smallest_shown(pairs.count, threshold)
    if smallest is None:
        detail += f"; {pairs.count} cases show no drop beyond this limit, so the measured one decides"
    else:
        detail += f"; fails from {100 * smallest:.1f} points on, nothing gained"
    return Row(metric, pairs.drop, threshold, "fail" if pairs.exceeds(threshold) else "pass", detail)


def judge(metric: str, value: float | None, threshold: float | None, detail: str, error: float = 0.0) -> Row:
    """The row of `metric`: with a threshold, what was not measured fails; without one, only broken numbers fail.

    An estimate meets its threshold when it still does `ERRORS` standard errors away from itself.
    """
    direction = METRICS[metric.partition(".")[0]].direction
    if value is None:
        return Row(metric, None, threshold, "info" if threshold is None else "fail", f"not measured: {detail}")
    if threshold is not None:
        cautious = value + (ERRORS if direction == "max" else -ERRORS) * error
        status = "pass" if metrics.meets(cautious, threshold, direction) else "fail"
        return Row(metric, value, threshold, status, detail, error)
    anything = math.inf if direction == "max" else -math.inf
    return Row(metric, value, None, "info" if metrics.meets(value, anything, direction) else "fail", detail, error)
