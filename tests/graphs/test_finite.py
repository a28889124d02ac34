"""NaN and infinity in a checkpoint's weights are found while it is hashed, in every dtype, at any place of a tensor."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from arriero.errors import Problems
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.sources import content_hash
from arriero.graphs.sources.finite import EXPONENTS, first_nonfinite
from arriero.graphs.sources.safetensors_header import to_float32

BITS = {"F16": np.uint16, "BF16": np.uint16, "F8_E5M2": np.uint8, "F8_E4M3": np.uint8}


@pytest.mark.parametrize("dtype", BITS)
def test_every_bit_pattern_is_judged_as_its_value(dtype):
    patterns = np.arange(np.iinfo(BITS[dtype]).max + 1, dtype=BITS[dtype])
    raw = patterns.view(np.float16) if dtype == "F16" else patterns
    finite = np.isfinite(to_float32(raw, dtype))
    for start in (0, 1, len(patterns) // 2, len(patterns) - 3):
        expected = np.flatnonzero(~finite[start:])
        found = first_nonfinite(patterns[start:].tobytes(), dtype)
        assert found == (int(expected[0]) if len(expected) else None)
    assert first_nonfinite(patterns[finite].tobytes(), dtype) is None


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_wide_dtypes_too(dtype):
    name = f"F{np.dtype(dtype).itemsize * 8}"
    largest = np.array([0, -0.0, np.finfo(dtype).max, np.finfo(dtype).tiny, -1], dtype)
    assert first_nonfinite(largest.tobytes(), name) is None
    for bad in (np.nan, np.inf, -np.inf):
        assert first_nonfinite(np.append(largest, dtype(bad)).tobytes(), name) == 5
    assert first_nonfinite(np.array([-1]).tobytes(), "I64") is None
    assert len(EXPONENTS) == 6


def checkpoint(folder: Path, bad: dict[str, tuple[tuple[int, ...], float]], dtype=torch.bfloat16) -> Checkpoint:
    tensors = {
        "model.norm.weight": torch.ones(7, dtype=dtype),
        "model.layers.0.feed_forward.experts.down_proj": torch.zeros(4, 30, 50, dtype=dtype),
        "model.layers.1.input_layernorm.weight": torch.ones(3, dtype=dtype),
    }
    for name, (index, value) in bad.items():
        tensors[name][index] = value
    folder.mkdir()
    save_file(tensors, str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama4_text"}))
    return Checkpoint.open(folder)


@pytest.mark.parametrize("block", [1 << 24, 64])
def test_one_value_that_no_case_touches_is_named_with_its_place(tmp_path, monkeypatch, block):
    monkeypatch.setattr(content_hash, "BLOCK", block)
    sound = checkpoint(tmp_path / "sound", {}).content_hash()
    experts, norm = "model.layers.0.feed_forward.experts.down_proj", "model.norm.weight"
    broken = checkpoint(tmp_path / "broken", {experts: ((2, 29, 3), float("nan")), norm: ((6,), float("-inf"))})
    memo = tmp_path / "memo.json"
    for _ in range(2):  # it is not remembered as sound
        with pytest.raises(Problems) as caught:
            broken.content_hash(memo)
        told = str(caught.value)
        assert f"{experts} ({experts} in model.safetensors): the value at [2, 29, 3] is NaN or infinite" in told
        assert f"{norm} ({norm} in model.safetensors): the value at [6]" in told
        assert len(caught.value.problems) == 2
    assert broken.known_content_hash(memo) is None
    monkeypatch.setattr(content_hash, "BLOCK", 1 << 20)
    assert checkpoint(tmp_path / "again", {}).content_hash() == sound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_dtype_of_a_file_is_checked(tmp_path, dtype):
    checkpoint(tmp_path / "sound", {}, dtype).content_hash()
    with pytest.raises(Problems, match=r"the value at \[1\]"):
        checkpoint(tmp_path / "bad", {"model.norm.weight": ((1,), float("nan"))}, dtype).content_hash()
