"""The parity thresholds of a target: its profile's, with what its cache may cost, and the build file's own."""

from __future__ import annotations

from arriero.errors import ArrieroError
from arriero.export.build_file.schema import BuildConfig, Target
from arriero.export.pipeline.record_plan import answer_mode
from arriero.profiles.kv_cache import widen_thresholds
from arriero.profiles.recipe import Profile
from arriero.thresholds import FORCED, OVER_RTN


def thresholds(build: BuildConfig, target: Target, profile: Profile) -> dict[str, float]:
    """The parity thresholds of `target`: its profile's, and the build file's own.

    A profile's are loosened by what a cache may cost that the target asks for.

    A profile's threshold on generated answers holds for forced ones where the build has these; the build file's own are
    refused when they are of the other kind. What beats an RTN baseline is asked of profiles that calibrate alone.
    """
    own = widen_thresholds(profile.thresholds, target.kv_cache or "float32")
    forced = answer_mode(build) == "forced"
    other = set(FORCED) if forced else set(FORCED.values())
    for name in build.parity.thresholds:
        if name.partition(".")[0] in other:
            raise ArrieroError(
                f"answers are {'forced' if forced else 'generated'} and this metric is not of these",
                where=f"parity.thresholds.{name}",
                expected=f"one of {', '.join(FORCED.values() if forced else FORCED)}",
                remedy="Name that metric, or say `answers` beside `thresholds`",
            )
    merged = {(_forced(name) if forced else name): value for name, value in own.items()} | build.parity.thresholds
    if profile.calibration is None:  # the build file may ask it of another target
        merged.pop(OVER_RTN, None)
    return merged


def _forced(name: str) -> str:
    """The metric on forced answers that stands for a profile's on generated ones; any other is itself."""
    base, dot, family = name.partition(".")
    return f"{FORCED.get(base, base)}{dot}{family}"
