"""Whether an encoded prompt is one that a model can read, asked before anything runs.

Shapes: S prompt tokens, n image tiles, M image placeholder tokens.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from arriero.errors import ArrieroError
from arriero.runtimes.backend import ModelSpec, no_vision
from arriero.runtimes.processor.processor import Prompt

TOGETHER = "Encode text and images together with the session's processor"


def check_prompt(prompt: Prompt, spec: ModelSpec) -> Prompt:
    """Give `prompt` with ids i64 [S] and tiles f32 [n, 3, h, w], or none. Raises `ArrieroError` with what is wrong."""
    ids, vocabulary = _array(prompt.input_ids, "ids"), spec.vocab_size
    if ids.size == 0:
        raise ArrieroError("the prompt has no tokens", expected="at least one")
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or np.any((ids < 0) | (ids >= vocabulary)):
        raise ArrieroError("the ids are not a flat list of known tokens", expected=f"numbers below {vocabulary}")
    tiles, features = _check_tiles(prompt, spec)
    placeholders = int(np.sum(ids == spec.image_token_id))
    if placeholders != features:
        raise ArrieroError(
            f"the ids hold {placeholders} image placeholders and the images make {features} features", remedy=TOGETHER
        )
    return replace(prompt, input_ids=ids.astype(np.int64, copy=False), pixel_values=tiles)


def _check_tiles(prompt: Prompt, spec: ModelSpec) -> tuple[np.ndarray | None, int]:
    """The tiles, and how many features the vision tower makes of them."""
    if prompt.pixel_values is None:
        return None, 0
    tiles, vision = _array(prompt.pixel_values, "pixel_values"), spec.vision
    if tiles.size == 0:
        return None, 0
    if vision is None:
        raise no_vision()
    if tiles.dtype.kind not in "fiu" or tiles.shape[1:] != (3, vision.image_size, vision.image_size):
        raise ArrieroError(
            f"pixel_values is {tiles.dtype} of the shape {list(tiles.shape)}",
            expected=f"float32 tiles [n, 3, {vision.image_size}, {vision.image_size}]",
            remedy="Encode the images with the session's processor",
        )
    return tiles.astype(np.float32, copy=False), len(tiles) * vision.tokens_per_tile


def _array(value: object, name: str) -> np.ndarray:
    try:
        array: np.ndarray = np.asarray(value)
    except (ValueError, TypeError):  # rows of different lengths, say
        array = np.asarray(None)
    if array.dtype.kind not in "fiu" and array.size:
        raise ArrieroError(f"{name} is {value!r:.60}", expected="an array of numbers")
    return array
