"""The named families, and drawing from them."""

from __future__ import annotations

import zlib
from collections.abc import Callable

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
