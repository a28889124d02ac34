"""Refuses thresholds that could not be judged, or that could only fail for want of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from arriero.errors import ArrieroError, Problems
from arriero.export.build_file.schema import BuildConfig
from arriero.export.samples.cases import modality
from arriero.graphs.config import ModelConfig
from arriero.profiles.recipe import Profile
from arriero.runtimes.proof.parity_case import ParityCase
from arriero.runtimes.proof.rtn_baseline import RTN_KL
from arriero.thresholds import OVER_RTN

VISION = "vision_relative_l2"


def check_thresholds(build: BuildConfig, config: ModelConfig, profiles: Mapping[str, Profile]) -> None:
    """Refuse thresholds on what no target of the build is measured by, which would be passed over in silence."""
    text = config.text
    idle = {RTN_KL: f"the RTN baseline's own KL is told and not judged: {OVER_RTN} is"}
    if all(profile.calibration is None for profile in profiles.values()):
        idle[OVER_RTN] = "no target's profile calibrates, so there is no RTN baseline to beat"
    if "image" not in build.modalities:
        idle[VISION] = "the build takes in text only"
    if not any(layer.chunked for layer in text.layers):
        idle["logits_kl_past_chunk"] = "the model has no layers with chunked attention"
    if not text.moe_layers:
        idle |= dict.fromkeys(("router_agreement", "router_agreement_lowest"), "the model has no MoE layers")
    problems = [
        ArrieroError(idle[name], where=f"parity.thresholds.{name}", remedy="Remove the threshold")
        for name in build.parity.thresholds
        if name in idle
    ]
    if problems:
        raise Problems("thresholds that could not be judged", problems)


def check_pictures(cases: Sequence[ParityCase], thresholds: Mapping[str, float]) -> None:
    """Refuse a threshold on the vision tower's features that no case shows a picture for."""
    if VISION in thresholds and all(modality(case) == "text" for case in cases):
        raise ArrieroError(
            "no parity case shows a picture",
            where=f"thresholds.{VISION}",
            expected="cases with images or videos",
            remedy="Give the set cases with pictures, or more samples",
        )
