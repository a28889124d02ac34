"""Refuses thresholds that could not be judged, or that could only fail for want of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from arriero.errors import ArrieroError, Problems
from arriero.export.build_file.schema import BuildConfig
from arriero.export.samples.cases import modality
from arriero.graphs.config import ModelConfig
from arriero.profiles.recipe import Profile
from arriero.runtimes.proof.given_routing import CANDIDATE_ROUTING_KL, FORCED_KL, ROUTING_SHARE
from arriero.runtimes.proof.parity_case import ParityCase
from arriero.runtimes.proof.rtn_baseline import RTN_KL
from arriero.thresholds import OVER_RTN
from arriero.traits import TRAITS

VISION = "vision_relative_l2"


def check_thresholds(build: BuildConfig, config: ModelConfig, profiles: Mapping[str, Profile]) -> None:
    """Refuse thresholds on what no target of the build is measured by, which would be passed over in silence."""
    text = config.text
    idle = {
        RTN_KL: f"the RTN baseline's own KL is told and not judged: {OVER_RTN} is",
        CANDIDATE_ROUTING_KL: "a build does not measure it: `arriero parity` with --exact or --against does",
    }
    if all(profile.calibration is None for profile in profiles.values()):
        idle[OVER_RTN] = "no target's profile calibrates, so there is no RTN baseline to beat"
    if "image" not in build.modalities:
        idle[VISION] = "the build takes in text only"
    if not any(layer.chunked for layer in text.layers):
        idle["logits_kl_past_chunk"] = "the model has no layers with chunked attention"
    if not text.moe_layers:
        routing = ("router_agreement", "router_agreement_lowest", FORCED_KL, ROUTING_SHARE)
        idle |= dict.fromkeys(routing, "the model has no MoE layers")
    problems = [
        ArrieroError(idle[name], where=f"parity.thresholds.{name}", remedy="Remove the threshold")
        for name in build.parity.thresholds
        if name in idle
    ]
    problems += [] if problems else _unforced(build, profiles)
    if problems:
        raise Problems("thresholds that could not be judged", problems)


def _unforced(build: BuildConfig, profiles: Mapping[str, Profile]) -> list[ArrieroError]:
    """A threshold on forced routing for each target that is not measured with it: it could only fail."""
    problems = []
    for target in build.targets:
        limits = {**profiles[target.profile].thresholds, **build.parity.thresholds}
        name = next((name for name in (FORCED_KL, ROUTING_SHARE) if name in limits), None)
        if name is None:
            continue
        where = f"target {target.name}: thresholds.{name}"
        if not build.parity.forced_routing:
            remedy = "Write `forced_routing: true` under `parity`, or remove the threshold"
            problems.append(ArrieroError("nothing is measured with forced routing", where=where, remedy=remedy))
        elif not TRAITS[target.backend].forces_routing:
            what = f"no routing can be forced on {target.backend}"
            problems.append(ArrieroError(what, where=where, remedy="Remove the threshold, or the target"))
    return problems


def check_pictures(cases: Sequence[ParityCase], thresholds: Mapping[str, float]) -> None:
    """Refuse a threshold on the vision tower's features that no case shows a picture for."""
    if VISION in thresholds and all(modality(case) == "text" for case in cases):
        raise ArrieroError(
            "no parity case shows a picture",
            where=f"thresholds.{VISION}",
            expected="cases with images or videos",
            remedy="Give the set cases with pictures, or more samples",
        )
