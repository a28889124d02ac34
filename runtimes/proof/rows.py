"""The rows of a parity report: every metric with its direction, once, and how a value is held against its threshold."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from arriero.errors import ArrieroError, Problems
from arriero.runtimes.proof import metrics
from arriero.runtimes.proof.paired import CONFIDENCE, Pairs, smallest_shown


@dataclass(frozen=True)
class Metric:
    """What a row's name means: its title, whether the threshold is a `max` or a `min`, its unit, one sentence."""

    title: str
    direction: str
    unit: str
    meaning: str


METRICS: dict[str, Metric] = {
    "same_prompt": Metric("Same prompt", "min", "share", "Cases whose token ids and pixels are equal on both sides."),
    "nonfinite_values": Metric("Values not finite", "max", "count", "NaN or infinite numbers of the candidate."),
    "logits_max_abs_error": Metric(
        "Logits, largest error", "max", "", "max |candidate - reference| over the logits that the reference keeps."
    ),
    "logits_relative_l2": Metric("Logits, relative error", "max", "", "|candidate - reference| / |reference|, L2."),
    "logits_kl_mean": Metric("Logits, mean KL", "max", "nat", "KL(reference || candidate), mean over tokens."),
    "logits_kl_lower_bound": Metric(
        "Logits, mean KL, lower bound", "max", "nat", "The log-sum inequality's bound; the KL itself where all is kept."
    ),
    "rtn_kl_mean": Metric(
        "Logits, mean KL of the RTN baseline", "max", "nat", "The same for the profile's own form without calibration."
    ),
    "kl_over_rtn": Metric(
        "KL over the RTN baseline's", "max", "share", "Mean KL over that of the profile's own form without calibration."
    ),
    "same_top_token": Metric("Same top token", "min", "share", "Tokens with the same largest logit, near ties apart."),
    "router_agreement": Metric(
        "Router agreement", "min", "share", "Tokens sent to the same experts over all MoE layers, near ties apart."
    ),
    "router_agreement_lowest": Metric(
        "Router agreement, lowest layer", "min", "share", "The same for the MoE layer that agrees least."
    ),
    "layer_relative_l2_highest": Metric(
        "Layers, highest relative error", "max", "", "Residual stream after the layer that is furthest off."
    ),
    "layer_snr_db_lowest": Metric("Layers, lowest SNR", "min", "dB", "Signal to noise of the same layer."),
    "embeddings_relative_l2": Metric(
        "Embeddings, relative error", "max", "", "Token lookup and image merge, both sides given the same features."
    ),
    "vision_relative_l2": Metric("Vision, relative error", "max", "", "Image features of the tower and projector."),
    "greedy_prefix_length": Metric(
        "Greedy prefix", "min", "share", "Common prefix of both greedy answers over the longer one, mean over cases."
    ),
    "task_accuracy_reference": Metric("Task accuracy, reference", "min", "share", "Answers scored right."),
    "task_accuracy_candidate": Metric("Task accuracy, candidate", "min", "share", "Answers scored right."),
    "task_accuracy_drop": Metric(
        "Task accuracy, drop", "max", "share", "Reference minus candidate; judged by what the cases show."
    ),
    "greedy_prefix_forced_length": Metric(
        "Forced greedy prefix", "min", "share", "Positions up to the first of the answer at which top tokens differ."
    ),
    "task_accuracy_forced_reference": Metric(
        "Forced accuracy, reference", "min", "share", "Answers led to by top tokens."
    ),
    "task_accuracy_forced_candidate": Metric(
        "Forced accuracy, candidate", "min", "share", "Answers led to by top tokens."
    ),
    "task_accuracy_forced_drop": Metric(
        "Forced accuracy, drop", "max", "share", "Reference minus candidate; judged by what the cases show."
    ),
}
# How the reference answers a case: token by token, or by its top token at every forced position.
AnswerMode = Literal["generated", "forced"]
# What is measured on generated answers -> the same on forced ones. A report has the one kind or the other.
FORCED = {
    "greedy_prefix_length": "greedy_prefix_forced_length",
    "task_accuracy_reference": "task_accuracy_forced_reference",
    "task_accuracy_candidate": "task_accuracy_forced_candidate",
    "task_accuracy_drop": "task_accuracy_forced_drop",
}
PER_FAMILY = tuple(name for pair in FORCED.items() for name in pair if name.startswith("task_accuracy"))
OVER_RTN = "kl_over_rtn"  # a threshold that only a build, or what it recorded, can judge
ALWAYS = {"same_prompt": 1.0, "nonfinite_values": 0.0}  # a bundle that breaks these is broken at any precision
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


def check_thresholds(thresholds: Mapping[str, float]) -> None:
    """Raise one ArrieroError, or Problems with all of them, for names no metric has and values that are no number."""
    problems = []
    for name, value in thresholds.items():
        base, _, family = name.partition(".")
        known = [metric for metric in METRICS if metric not in ALWAYS]
        if base not in known or (family and base not in PER_FAMILY) or name.endswith("."):
            near = difflib.get_close_matches(base, known, 1, 0.5)
            remedy = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known)}"
            problems.append(ArrieroError("no such parity metric", where=f"thresholds.{name}", remedy=remedy))
        elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            problems.append(
                ArrieroError(f"{value!r} is not a threshold", where=f"thresholds.{name}", expected="a finite number")
            )
    if len(problems) > 1:
        raise Problems("parity thresholds", problems)
    if problems:
        raise problems[0]
