"""How a matrix, or an expert's, is rounded from what was seen of its inputs."""

from __future__ import annotations

import numpy as np
import pytest

from arriero.export.calibration.round_matrices import Form, Observed, Rounded, Rounder
from arriero.profiles.gptq import gptq
from arriero.profiles.grids import Grid
from arriero.profiles.input_factor import EXPERTS_SHRINKAGE, InputFactor
from arriero.profiles.moments import Moments
from arriero.profiles.quantize import Quantized
from arriero.profiles.recipe import Calibration
from arriero.profiles.schemes import IntBlock
from arriero.profiles.stored_values import nearest

DAMPING, TOKENS = 0.01, 40
SCHEME = IntBlock(kind="int_block", bits=4, block=16, accuracy_level=4, rounding="gptq")


@pytest.fixture
def weight() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)


@pytest.fixture
def seen() -> Moments:
    draw = np.random.default_rng(1)
    seen = Moments(64)
    seen.add((draw.standard_normal((TOKENS, 64)) @ draw.standard_normal((64, 64))).astype(np.float32))
    return seen


def round_one(weight: np.ndarray, seen: Moments, expert: int | None, least: int = 1) -> Rounded:
    rule = Calibration(damping=DAMPING, minimum_tokens=least, below="nearest", reason="r")
    rounded, observed = Rounder({"f": Form(rule, {"t": SCHEME})}, ()).round("t", expert, lambda: weight, seen)
    assert isinstance(rounded, Rounded)
    assert isinstance(observed, Observed)
    assert observed.tokens == rounded.note.tokens == TOKENS
    return rounded


def same(one: object, other: object) -> bool:
    assert isinstance(one, Quantized)
    assert isinstance(other, Quantized)
    return np.array_equal(one.packed, other.packed) and np.array_equal(one.scales, other.scales)


def test_an_experts_moments_are_shrunk_and_no_others(weight: np.ndarray, seen: Moments) -> None:
    whole, shrunk = (
        gptq(weight, InputFactor.of(seen, DAMPING, share), grid=Grid(4), block=16, name="t")[0]
        for share in (0.0, EXPERTS_SHRINKAGE)
    )
    assert not same(whole, shrunk)
    assert same(round_one(weight, seen, None).values, whole)
    assert same(round_one(weight, seen, 3).values, shrunk)


@pytest.mark.parametrize("expert", [None, 3])
def test_fewer_tokens_than_the_rule_asks_for_give_nearest_integers(
    weight: np.ndarray, seen: Moments, expert: int | None
) -> None:
    assert round_one(weight, seen, expert, TOKENS).note.rounding == "gptq"
    rounded = round_one(weight, seen, expert, TOKENS + 1)
    assert rounded.note.rounding == "nearest"
    assert same(rounded.values, nearest(weight, SCHEME, name="t"))
