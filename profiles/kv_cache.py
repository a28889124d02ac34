"""How a bundle keeps keys and values: in float32, float16, or int8 with one static scale per layer, head and channel.

Float16 is rounded to the nearest; what is beyond 65,504 becomes infinite. In int8 a value x is stored as
clip(rint(x / scale), -128, 127), with scales from the ranges that calibration saw. Why static scales per channel: ONNX
Runtime's attention reads such a cache as it is, and our own multiplies its codes as they are. Scales per head and token
came closest where all were measured (the reference with rounded keys and values on the embedded model: per token, per
channel, per head, per layer, in this order), but ONNX Runtime has no kernel that reads them: every step would have to
widen the whole cache to float32 before it may attend.
Legend: n tokens, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from arriero.errors import ArrieroError, Problems
from arriero.thresholds import METRICS

CacheType = Literal["float32", "float16", "int8"]
ITEM_BYTES: dict[str, int] = {"float32": 4, "float16": 2, "int8": 1}

# With fewer, ranges are too narrow and what comes later is clipped. In the measurement above a third of this number
# gave 3.5 times the mean KL of five times as many; this number gave 1.3 times.
MINIMUM_TOKENS = 1024

# What the rounding may cost on top of a profile's own thresholds. None: beyond any promise, because a single token that
# goes to another expert decides the figure.
ALLOWED_LOSS: dict[CacheType, dict[str, float | None]] = {
    "float32": {},
    "float16": {
        "task_accuracy_drop": 0.005,
        "task_accuracy_candidate": 0.005,
        "same_top_token": 0.005,
        "router_agreement": 0.005,
        "router_agreement_lowest": 0.01,
        "greedy_prefix_length": 0.005,
        "logits_kl_mean": 0.001,
        "logits_max_abs_error": None,
        "logits_relative_l2": None,
        "layer_relative_l2_highest": None,
        "layer_snr_db_lowest": None,
    },
    "int8": {
        "task_accuracy_drop": 0.005,
        "task_accuracy_candidate": 0.005,
        "same_top_token": 0.03,
        "router_agreement": 0.03,
        "router_agreement_lowest": 0.05,
        "greedy_prefix_length": 0.03,
        "logits_kl_mean": 0.01,
        "logits_max_abs_error": None,
        "logits_relative_l2": None,
        "layer_relative_l2_highest": None,
        "layer_snr_db_lowest": None,
    },
}


class CacheRange:
    """Running absmax of one layer's keys and values as its cache holds them: `key` and `value` f32 [K, D].

    With `rotated`, both channels of a rotary pair get the pair's largest length: at a position that calibration never
    saw, the rotation turns the one into the other.
    """

    def __init__(self, heads: int, size: int, rotated: bool) -> None:
        self.tokens, self.rotated = 0, rotated
        self.key = np.zeros((heads, size), np.float32)
        self.value = np.zeros((heads, size), np.float32)

    def add(self, keys: NDArray[np.float32], values: NDArray[np.float32]) -> None:
        """Take in keys and values f32 [n, K, D], after QK-norm and rotation, interleaved pairs (2i, 2i+1)."""
        if not len(keys):
            return
        self.tokens += len(keys)
        if self.rotated:
            pairs = np.linalg.norm(keys.reshape(*keys.shape[:2], -1, 2), axis=-1)
            keys = np.repeat(pairs, 2, -1)
        self.key = np.maximum(self.key, np.abs(keys).max(0))
        self.value = np.maximum(self.value, np.abs(values).max(0))

    def to_json(self) -> dict[str, Any]:
        """Give the range as JSON values, which `cache_scales` reads."""
        return {"tokens": self.tokens, "key": self.key.tolist(), "value": self.value.tolist()}


@dataclass(frozen=True)
class CacheScales:
    """One layer's steps, `key` and `value` f32 [K, D]: an int8 code times its step is the value."""

    key: NDArray[np.float32]
    value: NDArray[np.float32]


@dataclass(frozen=True)
class StoredCache:
    """The dtype of keys and values in a bundle's cache, and for int8 each layer's scales."""

    dtype: CacheType = "float32"
    scales: Sequence[CacheScales] = ()


def cache_scales(ranges: Sequence[Mapping[str, Any]]) -> list[CacheScales]:
    """Give each layer's steps from what `CacheRange.to_json` recorded of it: the largest magnitude becomes 127.

    A channel that was always zero takes its head's largest step. Raises ArrieroError when too few tokens were seen, and
    Problems naming every layer and head without a single value to take a scale from.
    """
    check_tokens(min((int(one["tokens"]) for one in ranges), default=0))
    problems: list[ArrieroError] = []
    scales = [
        CacheScales(*(_steps(one[kind], f"layer {layer}, {kind}s", problems) for kind in ("key", "value")))
        for layer, one in enumerate(ranges)
    ]
    if problems:
        raise Problems("the int8 key/value cache has no scales", problems)
    return scales


def check_tokens(tokens: int) -> None:
    """Refuse to take the ranges of an int8 cache from fewer than `MINIMUM_TOKENS` calibration tokens."""
    if tokens < MINIMUM_TOKENS:
        raise ArrieroError(
            f"{tokens} calibration tokens are too few for the scales of an int8 key/value cache",
            where="calibration.samples",
            expected=f"at least {MINIMUM_TOKENS} tokens",
            remedy="Raise calibration.samples, or write `kv_cache: float32`",
        )


def widen_thresholds(thresholds: Mapping[str, float], cache: CacheType) -> dict[str, float]:
    """Give a profile's thresholds as they stand when its bundle keeps keys and values in `cache`.

    Where that rounds, what the profile limits is loosened by `ALLOWED_LOSS`, and the drop of task accuracy is limited
    even where the profile says nothing of it. A metric of one family, such as `task_accuracy_drop.recall`, goes as the
    metric does.
    """
    losses = ALLOWED_LOSS[cache]
    widened = {}
    for name, limit in {**({"task_accuracy_drop": 0.0} if losses else {}), **thresholds}.items():
        metric = name.partition(".")[0]
        loss = losses.get(metric, 0.0)
        if loss is not None:
            widened[name] = round(limit + loss if METRICS[metric].direction == "max" else limit - loss, 9)
    return widened


def _steps(largest: Any, where: str, problems: list[ArrieroError]) -> NDArray[np.float32]:
    """Steps [K, D] of the largest magnitudes [K, D]."""
    seen = np.asarray(largest, np.float32)
    heads = seen.max(-1, keepdims=True)
    if dead := [str(head) for head in np.flatnonzero(heads == 0)]:
        problems.append(
            ArrieroError(
                f"calibration saw nothing but zeros in head {', '.join(dead)}",
                where=where,
                expected="values to take a scale from",
                remedy="Check the checkpoint, or write `kv_cache: float32`",
            )
        )
    return (np.where(seen > 0, seen, heads) / np.float32(127)).astype(np.float32)
