"""The levels that codes stand for: where they come from, and that the kernels have the same."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from arriero.errors import ArrieroError
from arriero.graphs.lower import onnxruntime, tensorrt, tvm
from arriero.profiles.gptq import search_scales
from arriero.profiles.grids import NORMAL_LEVELS, Grid
from arriero.profiles.quantize import dequantize, join_codes, quantize, split_codes
from arriero.profiles.schemes import AsStored, IntBlock

KERNELS = Path(__file__).parents[2] / "export" / "compile" / "kernels"
BLOCK = 32
BLOCKS = {4: 32, 3: 64, 2: 64}  # over which the levels of so many bits were found
REACH = {4: 65.25, 3: 65.94, 2: 68.88}  # of the numbers that they were rounded from
NORMAL = [Grid(bits, "normal") for bits in NORMAL_LEVELS]


def normal_blocks(count: int, seed: int = 0, block: int = BLOCK) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, block)).astype(np.float32)


def best_scales(blocks: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The scale [n, 1] of each block, of both signs and all sizes that could do, of least squared error."""
    largest = np.abs(blocks).max(1, keepdims=True) / np.abs(levels).max()
    tried = np.concatenate([sign * largest * np.linspace(0.6, 1.1, 19) for sign in (1, -1)], 1)  # [n, 38]
    errors = [np.square(blocks - nearest(blocks / s[:, None], levels) * s[:, None]).sum(1) for s in tried.T]
    return np.take_along_axis(tried, np.argmin(errors, 0)[:, None], 1)


def nearest(values: np.ndarray, levels: np.ndarray) -> np.ndarray:
    return levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, values)]


@pytest.mark.parametrize("bits", NORMAL_LEVELS)
def test_lloyds_algorithm_changes_the_normal_levels_no_more(bits: int) -> None:
    blocks, start = normal_blocks(20_000, block=BLOCKS[bits]), np.array(NORMAL_LEVELS[bits], np.float64)
    levels = start.copy()
    for _ in range(3):
        scales = best_scales(blocks, levels)
        scaled, weights = blocks / scales, np.broadcast_to(scales**2, blocks.shape)
        numbers = np.searchsorted((levels[1:] + levels[:-1]) / 2, scaled)
        sums = np.bincount(numbers.ravel(), (weights * scaled).ravel(), 2**bits)
        levels = sums / np.bincount(numbers.ravel(), weights.ravel(), 2**bits)
        levels *= REACH[bits] / np.abs(levels).max()
    assert np.abs(levels - start).max() < 0.75


@pytest.mark.parametrize(("bits", "share"), [(4, 0.82), (3, 0.865), (2, 0.865)])
def test_on_normal_weights_they_leave_less_error_than_even_ones(bits: int, share: float) -> None:
    block = BLOCKS[bits]
    blocks, ones = normal_blocks(4000, 1, block), np.ones(block)
    left = {}
    for name in ("even", "normal"):
        grid = Grid(bits, name)
        scales = search_scales(blocks, ones, grid=grid, block=block, name="w")
        left[name] = np.square(blocks - grid.round(blocks / scales) * scales).sum()
    assert share - 0.02 < left["normal"] / left["even"] < share + 0.02


def test_the_kernels_have_the_same_levels() -> None:
    listed = re.findall(r"GRID(\d)\[\d+\] = \{([^}]*)\}", (KERNELS / "grids.h").read_text())
    assert {int(bits): tuple(map(int, levels.split(","))) for bits, levels in listed} == NORMAL_LEVELS


@pytest.mark.parametrize("grid", [Grid(4), Grid(8), *NORMAL], ids=str)
def test_codes_and_levels_are_each_others_inverse_and_rounding_takes_the_nearest(grid: Grid) -> None:
    codes = np.arange(2**grid.bits, dtype=np.uint8)
    levels = grid.levels(codes)
    np.testing.assert_array_equal(grid.codes(levels), codes)
    assert (levels[0], levels[-1], np.abs(levels).max()) == (grid.low, grid.high, grid.reach)
    values = np.linspace(1.3 * grid.low, 1.3 * -grid.low, 9973, dtype=np.float32)
    off, least = np.abs(grid.round(values) - values), np.abs(levels[:, None] - values).min(0)
    # of the normal grid it is the nearest of the value's half integer
    assert (off <= least + (0.5 if grid.name == "normal" else 1e-6)).all()
    into = np.empty_like(values)
    assert grid.round(values, out=into) is into
    np.testing.assert_array_equal(into, grid.round(values))


@pytest.mark.parametrize("size", [1e-9, 1e-5, 1e-2, 1.0, 1e4])
@pytest.mark.parametrize("bits", NORMAL_LEVELS)
def test_rounding_to_nearest_on_the_normal_grid(bits: int, size: float) -> None:
    weight = normal_blocks(50) * np.float32(size)
    weight[0] = 0
    weight[1, :] = np.abs(weight[1])
    rounded = quantize(weight, bits=bits, block=BLOCK, name="w", grid="normal")
    back, steps = dequantize(rounded), np.abs(rounded.scales)
    assert (back[0] == 0).all()
    assert (rounded.scales.astype(np.float16) == rounded.scales).all()
    ends = (
        -NORMAL_LEVELS[bits][0] - NORMAL_LEVELS[bits][-1]
    )  # the largest value may lie beyond the upper one by as much
    gap = max(np.diff(NORMAL_LEVELS[bits]).max() / 2 + 0.25, ends)
    assert (np.abs(back - weight) <= gap * steps * np.float32(1.001)).all()
    if size >= 1e-2:  # below, float16 has too few scales for its largest value to lie on a level
        at = np.abs(weight).argmax(1)[:, None]
        np.testing.assert_allclose(np.take_along_axis(back, at, 1), np.take_along_axis(weight, at, 1), rtol=3e-3)


@pytest.mark.parametrize("wrong", [{"bits": 8}, {"rounding": "stored"}])
def test_the_normal_grid_has_levels_of_few_bits_that_no_checkpoint_stores(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="levels for 2, 3, 4 bits, and no checkpoint"):
        IntBlock(**{"kind": "int_block", "bits": 4, "block": 32, "accuracy_level": 4, "grid": "normal", **wrong})


@pytest.mark.parametrize("bits", [2, 3])
def test_fewer_than_four_bits_number_levels(bits: int) -> None:
    with pytest.raises(ValueError, match=f"`bits: {bits}` needs `grid: normal`"):
        IntBlock(kind="int_block", bits=bits, block=32, accuracy_level=4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_lie_end_to_end_the_first_in_the_lowest_bits(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (2, 3, 48), np.uint8)
    packed = join_codes(codes, bits)
    assert packed.shape == (2, 3, 6 * bits)
    number = int.from_bytes(packed[1, 2].tobytes(), "little")
    assert [number >> bits * at & (2**bits - 1) for at in range(48)] == codes[1, 2].tolist()
    np.testing.assert_array_equal(split_codes(packed, bits), codes)


@pytest.mark.parametrize("lowering", [onnxruntime, tensorrt])
def test_backends_without_such_kernels_refuse_it_by_name(lowering: ModuleType) -> None:
    for level in (0, 4):
        scheme = IntBlock(kind="int_block", bits=4, block=32, accuracy_level=level, grid="normal")
        assert "4 bits of the normal grid" in str(lowering.lacks(scheme))
    assert tvm.lacks(scheme) is None


def test_two_steps_of_rounding_are_for_matrices_on_tvm_alone() -> None:
    fine = IntBlock(kind="int_block", bits=8, block=32, accuracy_level=2)
    assert tvm.lacks(fine) is None
    for other in (onnxruntime, tensorrt):
        assert other.lacks(fine) == "int8 in blocks of 32, activations in 16 bits"
    fine.check((16, 64), "w")
    with pytest.raises(ArrieroError, match="experts do not round their activations in two steps") as refused:
        fine.check((4, 64, 16), "layer.experts.down_proj")
    assert refused.value.where == "layer.experts.down_proj"


def test_a_checkpoints_own_codes_are_even_whatever_the_others_are_rounded_to() -> None:
    normal = IntBlock(kind="int_block", bits=4, block=32, accuracy_level=4, grid="normal")
    scheme = AsStored(kind="as_stored", otherwise=normal)
    held = scheme.held((4, 64))
    assert (scheme.held(None), held.label) == (normal, "int4 block 64 stored")
    assert isinstance(held, IntBlock)
    assert held.grid == "even"
