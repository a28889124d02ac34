"""Why a target is below a threshold, as far as the build can tell, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from arriero.export.pipeline.results import Failure
from arriero.profiles.recipe import Profile
from arriero.runtimes.proof.given_routing import ROUTING_SHARE
from arriero.runtimes.proof.pages import show, show_limit
from arriero.runtimes.proof.report import ParityReport
from arriero.runtimes.proof.rows import Row
from arriero.runtimes.proof.served import SERVED_KL
from arriero.thresholds import FORCED, OVER_RTN

DROPS = ("task_accuracy_drop", FORCED["task_accuracy_drop"])
REFERENCES = ("task_accuracy_reference", FORCED["task_accuracy_reference"])
MOSTLY = 0.5  # of the KL
FINER = "choose a finer profile, or lower the threshold knowingly"


def explain_failures(
    reports: Mapping[str | None, ParityReport], profile: Profile, coverage: Mapping[str, Sequence[int]]
) -> tuple[Failure, ...]:
    """Each failed row of `reports`, of the model itself (None) and with adapters; `coverage` are the calibration tokens
    of each expert, by MoE layer.
    """
    return tuple(
        replace(_explain(row, report, profile, coverage), adapter=adapter)
        for adapter, report in reports.items()
        for row in report.failed
    )


def thin_experts(profile: Profile, coverage: Mapping[str, Sequence[int]]) -> str | None:
    """The sentence on experts that too few calibration tokens reached for `profile`; None where there are none."""
    if profile.calibration is None:
        return None
    least = profile.calibration.minimum_tokens
    thin = {layer: sum(count < least for count in counts) for layer, counts in coverage.items()}
    experts = sum(map(len, coverage.values()))
    if not sum(thin.values()):
        return None
    worst = max(thin, key=lambda layer: thin[layer])
    most = f", most in layer {worst} ({thin[worst]})" if len(coverage) > 1 else ""
    return f"{sum(thin.values())} of {experts} experts had fewer than {least} calibration tokens{most}"


def _explain(row: Row, report: ParityReport, profile: Profile, coverage: Mapping[str, Sequence[int]]) -> Failure:
    cause, remedy = _cause(row, report, profile, coverage)
    title, value = row.title, "not measured" if row.value is None else show(row)
    if row.metric == OVER_RTN and row.value is not None:
        title, value = "KL", f"{value} of the RTN baseline's"
    return Failure(row.metric, title, value, show_limit(row) or "none: it has to be finite", cause, remedy)


def _cause(row: Row, report: ParityReport, profile: Profile, coverage: Mapping[str, Sequence[int]]) -> tuple[str, str]:
    name, _, family = row.metric.partition(".")
    if row.value is None:
        return row.detail, "give the parity set cases that show it, or leave the threshold out"
    if name == "same_prompt":
        return row.detail, "the bundle's tokenizer or processor is not the checkpoint's: build anew"
    if name == "nonfinite_values":
        return row.detail, "choose a profile of a wider number format"
    if name == SERVED_KL:
        return "the functions that answer do not give what the captured ones do", "report it with the bundle's manifest"
    if name in REFERENCES:
        what = "the checkpoint itself answers these cases wrong"
        return what, "check its chat template and the cases' answers, or lower the threshold knowingly"
    thin = thin_experts(profile, coverage)
    if thin is not None:
        return thin, "add samples to `calibration`, or others that reach them"
    if name == OVER_RTN:
        return "calibration gains too little over rounding to nearest", f"add samples to `calibration`, {FINER}"
    if name in DROPS and not family:
        lost = max(report.families, key=lambda one: one.lost, default=None)
        if lost is not None and lost.lost:
            return f"most answers were lost in {lost.family} ({lost.lost} of {lost.count})", FINER
    share = next((one.value for one in report.rows if one.metric == ROUTING_SHARE), None)
    if name.startswith("logits_kl") and share is not None and share >= MOSTLY:
        what = f"flipped routing causes {100 * share:.0f} % of the KL"
        return what, f"keep what leads to the routers, attention and shared experts, in more bits; else {FINER}"
    layers = [layer for layer in report.layers if layer.relative_l2 is not None]
    if layers:
        worst = max(layers, key=lambda layer: layer.relative_l2 or 0.0)
        return f"layer {worst.layer} is furthest off, relative error {worst.relative_l2:.2g}", FINER
    return row.detail, FINER
