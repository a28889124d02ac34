"""NaN and infinity in weights are found in every dtype, at any place of a tensor.

Those that a file holds as they are while it is hashed, those that are made of others as they are made.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from arriero.errors import ArrieroError, Problems
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.sources import content_hash, finite
from arriero.graphs.sources.finite import EXPONENTS, first_nonfinite
from arriero.graphs.sources.made_weight import MadeWeight
from arriero.graphs.sources.safetensors_header import NUMPY_DTYPES, to_float32
from arriero.graphs.sources.stored_codes import StoredCodes
from arriero.profiles.float8 import Float8
from arriero.profiles.quantize import Quantized

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


def test_every_piece_that_is_looked_at_counts(monkeypatch):
    monkeypatch.setattr(finite, "CHUNK", 4)
    for number in range(11):
        values = np.ones(11, np.float32)
        values[number:] = np.inf
        assert first_nonfinite(values.tobytes(), "F32") == first_nonfinite(values, "F32") == number
    assert first_nonfinite(b"", "F32") is None


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


@pytest.mark.parametrize("dtype", EXPONENTS)
def test_every_dtype_is_checked_where_values_are_made(dtype):
    unsigned, nan = EXPONENTS[dtype]
    bits = np.zeros((5, 2, 3), unsigned)
    made = MadeWeight("stack", bits.shape, dtype, "x in file", "", lambda a, b: bits[a:b].view(NUMPY_DTYPES[dtype]))
    assert made.rows(0, 5).shape == (5, 2, 3)
    assert made.rows(2, 2).shape == (0, 2, 3)
    bits[3, 1, 2] = nan
    made.rows(0, 3)
    with pytest.raises(ArrieroError, match=r"stack \(x in file\): the value at \[3, 1, 2\] is NaN or infinite"):
        made.rows(2, 5)


def coded(codes: Quantized | Float8, shape: tuple[int, ...]) -> MadeWeight:
    """A tensor of which `codes` are all codes."""

    def read(start: int, stop: int) -> Quantized | Float8:
        scales = codes.scales[start:stop]
        if isinstance(codes, Float8):
            return Float8(codes.bits[start:stop], scales)
        return Quantized(codes.packed[start:stop], scales, codes.bits, codes.block)

    return MadeWeight("matrix", shape, "F32", "x in file", "", lambda a, b: np.zeros(1), StoredCodes(8, 0, read))


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, np.finfo(np.float32).max])
def test_a_scale_that_makes_no_finite_values_is_refused_where_codes_are_read(scale):
    """The last is finite, and what a code makes of it is not."""
    packed, scales = np.full((4, 16), 0x99, np.uint8), np.ones((4, 2), np.float32)
    matrix = coded(Quantized(packed, scales, 4, 16), (4, 32))
    packed[:, 8:] = 0xBB
    assert matrix.codes.read(0, 4).bits == 4
    scales[2, 1] = scale
    with pytest.raises(ArrieroError, match=r"matrix \(x in file\): the value at \[2, 16\] is NaN or infinite"):
        matrix.codes.read(1, 4)
    assert matrix.codes.read(3, 4).bits == 4


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_the_nan_of_e4m3_is_refused_at_its_place_in_the_tensor(code):
    """Codes of a stack are turned round: outputs by inputs, where its values are inputs by outputs."""
    bits, scales = np.full((2, 3, 4), 0x7E, np.uint8), np.ones((2, 3), np.float32)
    stack = coded(Float8(bits, scales), (2, 4, 3))
    assert stack.codes.read(0, 2).bits.shape == (2, 3, 4)
    bits[1, 2, 0] = code
    with pytest.raises(ArrieroError, match=r"the value at \[1, 0, 2\] is NaN or infinite"):
        stack.codes.read(0, 2)


def test_a_large_scale_of_small_codes_is_no_fault():
    packed, scales = np.full((1, 8), 0x88, np.uint8), np.full((1, 1), np.finfo(np.float32).max)
    assert coded(Quantized(packed, scales, 4, 16), (1, 16)).codes.read(0, 1).scales == scales
