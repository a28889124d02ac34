"""Named sample sets as what the stages take: calibration prompts and parity cases."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from arriero.profiles.data import IMAGE_FAMILIES, TEXT_FAMILIES, Sample, make, score
from arriero.runtimes.parity import ParityCase


def draw_samples(modalities: Sequence[str], count: int, seed: int, split: str) -> list[Sample]:
    """`count` samples of the embedded families of `modalities`, spread evenly, in turn."""
    families = [*TEXT_FAMILIES, *(IMAGE_FAMILIES if "image" in modalities else ())]
    share = -(-count // len(families))
    columns = [make(family, share, seed, split) for family in families]
    return [sample for row in zip(*columns, strict=True) for sample in row][:count]


def parity_cases(modalities: Sequence[str], count: int, seed: int) -> list[ParityCase]:
    """Held-out samples as parity cases."""
    samples = draw_samples(modalities, count, seed, "held-out")
    return [
        ParityCase(
            name=f"{sample.family}-{number}",
            family=sample.family,
            prompt=sample.prompt,
            images=sample.images,
            answer=sample.answer,
            score=partial(score, sample),
        )
        for number, sample in enumerate(samples)
    ]
