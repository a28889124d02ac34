"""Matrices are rounded and packed some of their rows at a time: the same bytes as all at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.stored import panels
from arriero.graphs.stored import rounded as module
from arriero.graphs.stored.packed_panels import pack_gate_up_panels, pack_panels
from arriero.graphs.stored.rounded import float8, quantized
from arriero.graphs.stored.weight_store import WeightStore
from arriero.profiles.float8 import quantize_float8
from arriero.profiles.quantize import quantize
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
    monkeypatch.setattr(module, "GROUP", 2)
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


@pytest.mark.parametrize("outputs", [1, 3, 1000])
def test_slices_of_a_matrix_are_rounded_as_the_whole_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outputs: int
) -> None:
    checkpoint = Checkpoint.open(make_scout_toy(tmp_path / "toy", 1, vision=False))
    name = next(one for one in checkpoint.tensors if one.endswith("q_proj.weight"))
    weight = checkpoint.read_float32(name)[2:]
    monkeypatch.setattr(module, "SLICE_BYTES", outputs * weight[0].nbytes)
    monkeypatch.setattr(module, "GROUP", 2)
    store, rows = WeightStore(ir.Graph([], [], nodes=[]), checkpoint, {}), len(weight) + 2
    scheme = IntBlock(kind="int_block", bits=4, block=16, accuracy_level=4)
    got, want = quantized(store, name, scheme, 2, rows), nearest(weight, scheme, name=name)
    assert np.array_equal(got.packed, want.packed)
    assert np.array_equal(got.scales, want.scales)
    got8 = float8(store, name, Fp8(kind="fp8", activations="float32"), 2, rows)
    want8 = quantize_float8(weight, name=name)
    assert np.array_equal(got8.bits, want8.bits)
    assert np.array_equal(got8.scales, want8.scales)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("outputs", [32, 72, 160])
def test_groups_of_rows_are_packed_as_the_whole_is(
    monkeypatch: pytest.MonkeyPatch, outputs: int, bits: int, gated: bool
) -> None:
    weight = np.random.default_rng(0).standard_normal((outputs, 64)).astype(np.float32)
    codes = quantize(weight, bits=bits, block=32, name="w")
    want = (pack_gate_up_panels if gated else pack_panels)(codes)
    monkeypatch.setattr(panels, "GROUP_NUMBERS", 1)
    got = panels.in_groups(codes, gated)
    assert np.array_equal(got.packed, want.packed)
    assert np.array_equal(got.scales, want.scales)
    assert (got.bits, got.block) == (bits, 32)
