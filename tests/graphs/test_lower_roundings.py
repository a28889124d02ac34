"""Calibrated roundings reach the kernels: each row where it is read, negative scales and the lowest integer too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from arriero.errors import ArrieroError
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.config import ModelConfig
from arriero.graphs.lower.onnxruntime import lower
from arriero.graphs.lower.part import Lowering
from arriero.graphs.trace import trace_text
from arriero.profiles.gptq import gptq
from arriero.profiles.grids import Grid
from arriero.profiles.groups import is_layer_matrix
from arriero.profiles.input_factor import InputFactor
from arriero.profiles.moments import Moments
from arriero.profiles.quantize import dequantize
from arriero.profiles.quantized_weights import QuantizedWeights, RoundingRecord
from arriero.profiles.schemes import Exact, IntBlock, Scheme
from tests.graphs.test_lower_onnxruntime import CUTS, LENGTH, Stepper, stepped, whole
from tests.toys import load_reference, make_maverick_toy, make_scout_toy

TOYS = {"scout": make_scout_toy, "maverick": make_maverick_toy}
# At level 0 the kernels keep activations in float32, so only the order of summation differs.
TOLERANCE = 5e-6


def assign(checkpoint: Checkpoint) -> dict[str, Scheme]:
    scheme = IntBlock(kind="int_block", bits=4, block=16, accuracy_level=0, rounding="gptq")
    return {name: scheme if is_layer_matrix(name) else Exact() for name in checkpoint.tensors}


def round_all(
    checkpoint: Checkpoint, schemes: dict[str, Scheme], folder: Path
) -> tuple[QuantizedWeights, dict[str, np.ndarray]]:
    """Every matrix rounded for made-up inputs; also what the roundings stand for, in the checkpoint's layout."""
    store, rng = QuantizedWeights(folder), np.random.default_rng(0)
    values = {}
    for name, scheme in schemes.items():
        if not isinstance(scheme, IntBlock):
            continue
        weight = checkpoint.read_float32(name)
        stack = weight.swapaxes(-1, -2) if weight.ndim == 3 else weight[None]
        made = []
        for number, matrix in enumerate(stack):
            seen = Moments(matrix.shape[1])
            seen.add(rng.standard_normal((40, matrix.shape[1])).astype(np.float32))
            shape = {"grid": Grid(scheme.bits, scheme.grid), "block": scheme.block}
            rounded, _ = gptq(np.ascontiguousarray(matrix), InputFactor.of(seen, 0.03), **shape, name=name)
            expert = number if weight.ndim == 3 else None
            store.write(name, expert, len(stack), rounded, RoundingRecord(name, expert, "gptq", 40, 1.0, 0.5))
            made.append(dequantize(rounded))
        values[name] = np.stack(made).swapaxes(-1, -2) if weight.ndim == 3 else made[0]
    return store, values


@pytest.mark.parametrize("toy", TOYS)
def test_the_kernels_compute_with_exactly_these_roundings(tmp_path: Path, toy: str) -> None:
    folder = TOYS[toy](tmp_path / "toy", 1)
    config, checkpoint = ModelConfig.load(folder), Checkpoint.open(folder)
    schemes = assign(checkpoint)
    store, values = round_all(checkpoint, schemes, tmp_path / "roundings")
    assert any((np.load(path) < 0).any() for path in store.folder.glob("*.scales.npy"))
    canonical = trace_text(config, checkpoint, tmp_path / "graph" / "text.onnx")
    table = lower("text", canonical, Lowering(config, checkpoint, schemes, tmp_path / "out", roundings=store))
    assert {entry["scheme"] for entry in table.values()} >= {"int4 block 16 gptq", "exact"}
    reference = load_reference(folder)
    state = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in values.items()}
    reference.load_state_dict(state, strict=False, assign=True)
    draw = torch.Generator().manual_seed(1)
    embeds = torch.randn(1, LENGTH, config.text.hidden_size, generator=draw)
    want = whole(reference, embeds)
    got = stepped(Stepper(tmp_path / "out" / "text.onnx", config, 1), embeds.numpy(), CUTS)
    error = np.linalg.norm(got["logits"] - want.logits.numpy()) / np.linalg.norm(want.logits.numpy())
    assert error < TOLERANCE


def test_a_rounding_that_is_not_there_is_named(tmp_path: Path) -> None:
    folder = make_scout_toy(tmp_path / "toy", 1, vision=False)
    config, checkpoint = ModelConfig.load(folder), Checkpoint.open(folder)
    canonical = trace_text(config, checkpoint, tmp_path / "graph" / "text.onnx")
    with pytest.raises(ArrieroError, match="calibration gave no rounding for this tensor"):
        lower("text", canonical, Lowering(config, checkpoint, assign(checkpoint), tmp_path / "out"))
