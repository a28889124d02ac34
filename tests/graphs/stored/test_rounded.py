"""Experts are rounded some of their rows at a time: the same bytes as all at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.stored import rounded as module
from arriero.graphs.stored.rounded import float8, quantized
from arriero.graphs.stored.weight_store import WeightStore
from arriero.profiles.float8 import quantize_float8
from arriero.profiles.schemes import Fp8, IntBlock, Scheme
from arriero.profiles.stored_values import nearest
from tests.toys import make_scout_toy


@pytest.mark.parametrize("outputs", [1, 3, 1000])
@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_slices_of_experts_are_rounded_as_the_whole_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, outputs: int
) -> None:
    checkpoint = Checkpoint.open(make_scout_toy(tmp_path / "toy", 1, vision=False))
    stack = next(one for one in checkpoint.tensors if one.endswith(f"experts.{name}"))
    weight = np.ascontiguousarray(checkpoint.read_float32(stack, 1, 3).swapaxes(1, 2))  # [2, N, K]
    monkeypatch.setattr(module, "SLICE_BYTES", outputs * weight[:, 0].nbytes)
    schemes: list[Scheme] = [
        IntBlock(kind="int_block", bits=8, block=16, accuracy_level=4),
        IntBlock(kind="int_block", bits=4, block=16, accuracy_level=4),
        IntBlock(kind="int_block", bits=4, block=16, accuracy_level=4, grid="normal"),
    ]
    store = WeightStore(ir.Graph([], [], nodes=[]), checkpoint, {})
    for scheme in schemes:
        assert isinstance(scheme, IntBlock)
        got, want = quantized(store, stack, scheme, 1, 3), nearest(weight, scheme, name=stack)
        assert np.array_equal(got.packed, want.packed)
        assert np.array_equal(got.scales, want.scales)
        assert (got.bits, got.block, got.grid) == (want.bits, want.block, want.grid)
    got8, want8 = (
        float8(store, stack, Fp8(kind="fp8", activations="float32"), 1, 3),
        quantize_float8(weight, name=stack),
    )
    assert np.array_equal(got8.bits, want8.bits)
    assert np.array_equal(got8.scales, want8.scales)
