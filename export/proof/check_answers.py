"""Refuses thresholds that a parity set has no answers for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from arriero.errors import ArrieroError
from arriero.runtimes.proof.parity_case import ParityCase
from arriero.thresholds import PER_FAMILY


def check_answers(cases: Sequence[ParityCase], thresholds: Mapping[str, float]) -> None:
    """Refuse thresholds on task accuracy that no case has an answer for: they could only fail."""
    scored = sorted({case.family for case in cases if case.scorer})
    for name in thresholds:
        metric, _, family = name.partition(".")
        if metric in PER_FAMILY and (not scored or (family and family not in scored)):
            raise ArrieroError(
                f"no parity case{f' of {family}' if family else ''} has an answer",
                where=f"thresholds.{name}",
                expected=f"cases with answers (there are some of: {', '.join(scored) or 'none'})",
                remedy="Give answers to the cases of the set, more samples, or another profile",
            )
