"""Ranges and scales of the int8 key/value cache, and the thresholds that go with it."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest

from arriero.errors import ArrieroError, Problems
from arriero.profiles.kv_cache import ITEM_BYTES, MINIMUM_TOKENS, CacheRange, CacheType, cache_scales, widen_thresholds

HEADS, SIZE = 3, 8


def draw(tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((tokens, HEADS, SIZE)).astype(np.float32)


def seen(key: Any = None, value: Any = None, tokens: int = MINIMUM_TOKENS) -> dict[str, Any]:
    ones = np.ones((HEADS, SIZE))
    return {
        "tokens": tokens,
        "key": (ones if key is None else key).tolist(),
        "value": (ones if value is None else value).tolist(),
    }


def test_the_range_of_pieces_is_that_of_the_whole() -> None:
    keys, values = draw(50), draw(50, 1)
    found = CacheRange(HEADS, SIZE, rotated=False)
    for start, stop in ((0, 0), (0, 1), (1, 30), (30, 50)):
        found.add(keys[start:stop], values[start:stop])
    assert found.tokens == 50
    np.testing.assert_array_equal(found.key, np.abs(keys).max(0))
    np.testing.assert_array_equal(found.value, np.abs(values).max(0))


def test_a_rotated_key_stays_in_range_wherever_it_stands() -> None:
    keys = draw(40)
    found = CacheRange(HEADS, SIZE, rotated=True)
    found.add(keys, draw(40, 1))
    pairs = keys[..., 0::2] + 1j * keys[..., 1::2]
    beyond = 0.0
    for angle in np.linspace(0, np.pi, 50):
        turned = pairs * np.exp(1j * angle)
        back = np.stack([turned.real, turned.imag], -1).reshape(keys.shape)
        assert (np.abs(back) <= found.key * (1 + 1e-6)).all()
        beyond = max(beyond, float((np.abs(back).max(0) / np.abs(keys).max(0)).max()))
    assert beyond > 1.2  # the range of the channels as they were seen would not have held
    np.testing.assert_array_equal(found.value, np.abs(draw(40, 1)).max(0))


def test_the_largest_value_seen_becomes_127() -> None:
    ranges = [CacheRange(HEADS, SIZE, rotated) for rotated in (True, False)]
    for number, one in enumerate(ranges):
        one.add(draw(MINIMUM_TOKENS, number), 5 * draw(MINIMUM_TOKENS, number + 2))
    scales = cache_scales([one.to_json() for one in ranges])
    for one, layer in zip(ranges, scales, strict=True):
        np.testing.assert_allclose(127 * layer.key, one.key, rtol=1e-6)
        np.testing.assert_allclose(127 * layer.value, one.value, rtol=1e-6)
        assert (layer.key.dtype, layer.value.shape) == (np.float32, (HEADS, SIZE))


def test_a_channel_without_values_takes_its_heads_scale() -> None:
    key = np.arange(1.0, 1 + HEADS * SIZE).reshape(HEADS, SIZE)
    key[1, 3] = 0
    (scales,) = cache_scales([seen(key)])
    assert scales.key[1, 3] == scales.key[1].max() == np.float32(16 / 127)


def test_heads_without_values_are_all_named() -> None:
    dead = np.ones((HEADS, SIZE))
    dead[[0, 2]] = 0
    with pytest.raises(Problems) as caught:
        cache_scales([seen(), seen(value=dead), seen(key=dead)])
    told = str(caught.value)
    for sentence in (
        "layer 1, values: calibration saw nothing but zeros in head 0, 2",
        "layer 2, keys: calibration saw nothing but zeros in head 0, 2",
        "kv_cache: float32",
    ):
        assert sentence in told


@pytest.mark.parametrize("ranges", [[], [seen(), seen(tokens=MINIMUM_TOKENS - 1)]])
def test_scales_are_not_taken_from_too_little(ranges: list[dict[str, Any]]) -> None:
    with pytest.raises(ArrieroError, match=r"calibration tokens are too few.*at least 1024 tokens.*Raise calibration"):
        cache_scales(ranges)


def test_items_take_what_their_dtype_takes() -> None:
    assert {name: np.dtype(name).itemsize for name in get_args(CacheType)} == ITEM_BYTES


def test_thresholds_are_loosened_by_what_the_cache_may_cost() -> None:
    exact = {"router_agreement": 1.0, "same_top_token": 1.0, "logits_max_abs_error": 1e-4}
    assert widen_thresholds(exact, "float32") == exact
    assert widen_thresholds(exact, "float16") == {
        "router_agreement": 0.995,
        "same_top_token": 0.995,
        "task_accuracy_drop": 0.005,
    }
    assert widen_thresholds(exact, "int8") == {
        "router_agreement": 0.97,
        "same_top_token": 0.97,
        "task_accuracy_drop": 0.005,
    }
    coarse = {"kl_over_rtn": 0.5, "task_accuracy_drop": 0.02, "task_accuracy_drop.recall": 0.0, "logits_kl_mean": 0.1}
    assert widen_thresholds(coarse, "int8") == {
        "kl_over_rtn": 0.5,
        "task_accuracy_drop": 0.025,
        "task_accuracy_drop.recall": 0.005,
        "logits_kl_mean": 0.11,
    }
