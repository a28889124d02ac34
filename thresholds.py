"""Every metric of the parity report, once: its direction, its unit, what it means, and who may set a threshold on it.

Profiles and build files set thresholds, the parity report holds values against them; both read this table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from arriero.errors import ArrieroError, nearest, raise_together


@dataclass(frozen=True)
class Metric:
    """What a row's name means: its title, whether the threshold is a `max` or a `min`, its unit, one sentence."""

    title: str
    direction: Literal["min", "max"]
    unit: str
    meaning: str


METRICS: dict[str, Metric] = {
    "same_prompt": Metric("Same prompt", "min", "share", "Cases whose token ids and pixels are equal on both sides."),
    "nonfinite_values": Metric("Values not finite", "max", "count", "NaN or infinite numbers of the candidate."),
    "served_kl_highest": Metric(
        "Served logits, highest KL",
        "max",
        "nat",
        "KL(proven || as an app gets them) after the first case's prompt, and after one token more.",
    ),
    "logits_max_abs_error": Metric(
        "Logits, largest error", "max", "", "max |candidate - reference| over the logits that the reference keeps."
    ),
    "logits_relative_l2": Metric("Logits, relative error", "max", "", "|candidate - reference| / |reference|, L2."),
    "logits_kl_mean": Metric("Logits, mean KL", "max", "nat", "KL(reference || candidate), mean over tokens."),
    "logits_kl_standard_error": Metric(
        "Logits, mean KL, standard error", "max", "nat", "How far the mean may be off that of all cases of this kind."
    ),
    "logits_kl_lower_bound": Metric(
        "Logits, mean KL, lower bound", "max", "nat", "The log-sum inequality's bound; the KL itself where all is kept."
    ),
    "logits_kl_median": Metric("Logits, median KL", "max", "nat", "Half of the tokens have at most this KL."),
    "logits_kl_p99": Metric("Logits, KL, 99th percentile", "max", "nat", "One token of a hundred has more."),
    "logits_kl_p999": Metric("Logits, KL, 99.9th percentile", "max", "nat", "One token of a thousand has more."),
    "logits_kl_past_chunk": Metric(
        "Logits, mean KL past the first attention chunk", "max", "nat", "Over tokens that chunked layers see less of."
    ),
    "logits_kl_answers": Metric(
        "Logits, mean KL of answers", "max", "nat", "Over the tokens of the expected answers, without their prompts."
    ),
    "logits_kl_forced_routing": Metric(
        "Logits, mean KL, routing forced", "max", "nat", "Tokens sent to the reference's experts: what rounding costs."
    ),
    "logits_kl_routing_share": Metric(
        "Logits, share of KL due to routing", "max", "share", "What of the mean KL is gone where routing is forced."
    ),
    "logits_kl_candidate_routing": Metric(
        "Logits, mean KL, exact but for routing",
        "max",
        "nat",
        "An exact model, its tokens sent to the candidate's experts.",
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
# Metrics that may name one family of tasks, as in `task_accuracy_drop.recall`.
PER_FAMILY = tuple(name for pair in FORCED.items() for name in pair if name.startswith("task_accuracy"))
# Below this share of right answers of the reference itself, two equal sides prove that both make the same mistakes.
REFERENCE_FLOOR = 0.25
OVER_RTN = "kl_over_rtn"  # a threshold that only a build, or what it recorded, can judge
# A bundle that breaks these is broken at any precision. What is served differs by the order of sums, 2e-10 at most on
# six bundles of the embedded model for CPUs; there is room for a large model's router whose near tie falls otherwise.
ALWAYS = {"same_prompt": 1.0, "nonfinite_values": 0.0, "served_kl_highest": 0.05}
SETTABLE = tuple(metric for metric in METRICS if metric not in ALWAYS)


def check_name(name: str) -> None:
    """Raise ArrieroError, with the nearest name, when a threshold's name is neither a metric's nor a family's."""
    metric, dot, family = name.partition(".")
    if metric not in SETTABLE or (dot and (not family or metric not in PER_FAMILY)):
        remedy = nearest(metric, SETTABLE) or f"Known: {', '.join(SETTABLE)}"
        if metric in SETTABLE:
            remedy = f"Only {', '.join(PER_FAMILY)} may name a family"
        raise ArrieroError("no such parity metric", where=f"thresholds.{name}", remedy=remedy)


def check_thresholds(thresholds: Mapping[str, float]) -> None:
    """Raise one ArrieroError, or Problems with all of them, for names no metric has and values that are no number."""
    problems = []
    for name, value in thresholds.items():
        try:
            check_name(name)
        except ArrieroError as error:
            problems.append(error)
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            problems.append(
                ArrieroError(f"{value!r} is not a threshold", where=f"thresholds.{name}", expected="a finite number")
            )
    raise_together(problems, "parity thresholds")
