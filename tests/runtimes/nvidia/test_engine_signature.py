"""The signature of an engine: profiles are chosen by shape, and what crosses to the host is widened exactly."""

from __future__ import annotations

import json

import numpy as np
import pytest

from arriero.errors import ArrieroError
from arriero.runtimes.nvidia.engine_signature import Signature, Tensor

INPUTS = [
    {"name": "x", "dtype": "FLOAT", "shape": ["batch", "seq"]},
    {"name": "cache", "dtype": "BFLOAT16", "shape": ["batch", 16]},
]
DECODE = {"name": "decode", "ranges": {"x": [[1, 1], [4, 1], [4, 1]], "cache": [[1, 16], [4, 16], [4, 16]]}}
PREFILL = {"name": "prefill", "ranges": {"x": [[1, 1], [1, 64], [1, 64]], "cache": [[1, 16], [1, 16], [1, 16]]}}


@pytest.fixture
def signature(tmp_path) -> Signature:
    (tmp_path / "text.json").write_text(json.dumps({"inputs": INPUTS, "outputs": [], "profiles": [DECODE, PREFILL]}))
    return Signature.read(tmp_path / "text.json")


@pytest.mark.parametrize(("batch", "steps", "profile"), [(1, 1, 0), (4, 1, 0), (1, 2, 1), (1, 64, 1)])
def test_the_first_profile_that_fits_is_taken(signature, batch, steps, profile):
    assert signature.choose({"x": (batch, steps), "cache": (batch, 16)}) == profile


def test_what_no_profile_takes_is_told_for_each(signature):
    told = (
        r"text\.json: no profile of the engine takes this step: x is \[5, 1\] and decode takes \[1, 1\] to \[4, 1\]; "
        r"x is \[5, 1\] and prefill takes \[1, 1\] to \[1, 64\]\. Build the target with a larger `batch`"
    )
    with pytest.raises(ArrieroError, match=told):
        signature.choose({"x": (5, 1), "cache": (5, 16)})


def test_limits_of_an_axis(signature):
    assert signature.limits("x", 0) == (1, 1)  # of every profile
    assert signature.most("x", 0) == 4  # of any
    assert signature.limits("cache", 1) == (16, 16)


def test_a_dynamic_input_without_a_range_is_refused(tmp_path):
    bare = {"inputs": INPUTS, "outputs": [], "profiles": [{"name": "decode", "ranges": {}}]}
    (tmp_path / "text.json").write_text(json.dumps(bare))
    with pytest.raises(ArrieroError, match=r"no profile has a range for the input x.*arriero build"):
        Signature.read(tmp_path / "text.json").limits("x", 0)


@pytest.mark.parametrize(
    ("dtype", "stored", "read"),
    [
        ("FLOAT", np.array([1.5, -2.0], np.float32), np.array([1.5, -2.0], np.float32)),
        ("FLOAT16", np.array([1.5, -2.0], np.float16), np.array([1.5, -2.0], np.float32)),
        ("BFLOAT16", np.array([0x3FC0, 0xC000], np.uint16), np.array([1.5, -2.0], np.float32)),
        ("INT32", np.array([7, -1], np.int32), np.array([7, -1], np.int64)),
        ("INT64", np.array([7, -1], np.int64), np.array([7, -1], np.int64)),
    ],
)
def test_values_are_widened_and_copied(dtype, stored, read):
    found = Tensor("y", dtype, (2,)).read(stored)
    assert found.dtype == read.dtype
    assert np.array_equal(found, read)
    assert not np.shares_memory(found, stored)
