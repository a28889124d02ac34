"""The named families, drawing from them, and the one scoring function."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import numpy as np

from arriero.errors import ArrieroError
from arriero.profiles.data import pictures, text
from arriero.profiles.data.sample import Sample

Generator = Callable[[np.random.Generator, bool], Sample]

TEXT_FAMILIES: dict[str, Generator] = {
    "recall": text.recall,
    "arithmetic": text.arithmetic,
    "sorting": text.sorting,
}
IMAGE_FAMILIES: dict[str, Generator] = {
    "shape": pictures.shape,
    "colour": pictures.colour,
    "count": pictures.count,
    "position": pictures.position,
    "describe": pictures.describe,
    "several": pictures.several,
    "video": pictures.video,
}
FAMILIES = {**TEXT_FAMILIES, **IMAGE_FAMILIES}


def make(family: str, count: int, seed: int, split: str = "held-out") -> list[Sample]:
    """Draw `count` samples of a family from `split` ("train" or "held-out"); the same arguments give the same samples.

    Raises `ArrieroError` for an unknown family.
    """
    if family not in FAMILIES:
        raise ArrieroError(f"there is no task family {family!r}", expected=f"one of {', '.join(FAMILIES)}")
    rng = np.random.default_rng([seed, zlib.crc32(family.encode()), split == "train"])
    return [FAMILIES[family](rng, split == "train") for _ in range(count)]


def score(sample: Sample, answer: str) -> bool:
    """Whether `answer` is the sample's right answer (see `same_answer`)."""
    return same_answer(sample.answer, answer)


def same_answer(right: str, answer: str) -> bool:
    """Whether `answer` is `right`, blind to case, spacing and a final full stop."""
    return _plain(answer) == _plain(right)


def accuracy(samples: Sequence[Sample], answers: Sequence[str]) -> float:
    """Share of right answers: task accuracy."""
    return float(np.mean([score(sample, answer) for sample, answer in zip(samples, answers, strict=True)]))


def _plain(text: str) -> str:
    return " ".join(text.lower().strip().rstrip(".").split())
