"""The levels that codes stand for: where they come from, and that the kernels have the same."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from arriero.graphs.lower import onnxruntime, tensorrt, tvm
from arriero.profiles.gptq import search_scales
from arriero.profiles.grids import NORMAL_LEVELS, Grid
from arriero.profiles.quantize import dequantize, quantize
from arriero.profiles.schemes import AsStored, IntBlock

KERNELS = Path(__file__).parents[2] / "export" / "compile" / "kernels"
BLOCK = 32


def normal_blocks(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, BLOCK)).astype(np.float32)


def best_scales(blocks: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The scale [n, 1] of each block, of both signs and all sizes that could do, of least squared error."""
    largest = np.abs(blocks).max(1, keepdims=True) / np.abs(levels).max()
    tried = np.concatenate([sign * largest * np.linspace(0.75, 1.1, 15) for sign in (1, -1)], 1)  # [n, 30]
    errors = [np.square(blocks - nearest(blocks / s[:, None], levels) * s[:, None]).sum(1) for s in tried.T]
    return np.take_along_axis(tried, np.argmin(errors, 0)[:, None], 1)


def nearest(values: np.ndarray, levels: np.ndarray) -> np.ndarray:
    return levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, values)]


def test_lloyds_algorithm_changes_the_normal_levels_no_more() -> None:
    blocks, start = normal_blocks(40_000), np.array(NORMAL_LEVELS, np.float64)
    levels = start.copy()
    for _ in range(3):
        scales = best_scales(blocks, levels)
        scaled, weights = blocks / scales, np.broadcast_to(scales**2, blocks.shape)
        numbers = np.searchsorted((levels[1:] + levels[:-1]) / 2, scaled)
        sums = np.bincount(numbers.ravel(), (weights * scaled).ravel(), 16)
        levels = sums / np.bincount(numbers.ravel(), weights.ravel(), 16)
        levels *= 65.25 / np.abs(levels).max()  # that they were rounded from
    assert np.abs(levels - start).max() < 0.75


def test_on_normal_weights_they_leave_four_fifths_of_the_error_of_even_ones() -> None:
    blocks, ones = normal_blocks(4000, 1), np.ones(BLOCK)
    left = {}
    for name in ("even", "normal"):
        grid = Grid(4, name)
        scales = search_scales(blocks, ones, grid=grid, block=BLOCK, name="w")
        left[name] = np.square(blocks - grid.round(blocks / scales) * scales).sum()
    assert 0.80 < left["normal"] / left["even"] < 0.84


def test_the_kernels_have_the_same_levels() -> None:
    listed = re.search(r"GRID4\[16\] = \{([^}]*)\}", (KERNELS / "grid4.h").read_text())
    assert listed is not None
    assert tuple(map(int, listed.group(1).split(","))) == NORMAL_LEVELS


@pytest.mark.parametrize("grid", [Grid(4), Grid(8), Grid(4, "normal")], ids=str)
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
def test_rounding_to_nearest_on_the_normal_grid(size: float) -> None:
    weight = normal_blocks(50) * np.float32(size)
    weight[0] = 0
    weight[1, :] = np.abs(weight[1])
    rounded = quantize(weight, bits=4, block=BLOCK, name="w", grid="normal")
    back, steps = dequantize(rounded), np.abs(rounded.scales)
    assert (back[0] == 0).all()
    assert (rounded.scales.astype(np.float16) == rounded.scales).all()
    gap = np.diff(NORMAL_LEVELS).max() / 2 + 0.25
    assert (np.abs(back - weight) <= gap * steps * np.float32(1.001)).all()
    if size >= 1e-2:  # below, float16 has too few scales for its largest value to lie on a level
        at = np.abs(weight).argmax(1)[:, None]
        np.testing.assert_allclose(np.take_along_axis(back, at, 1), np.take_along_axis(weight, at, 1), rtol=3e-3)


@pytest.mark.parametrize("wrong", [{"bits": 8}, {"rounding": "stored"}])
def test_the_normal_grid_has_levels_of_four_bits_that_no_checkpoint_stores(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="levels for `bits: 4` alone"):
        IntBlock(**{"kind": "int_block", "bits": 4, "block": 32, "accuracy_level": 4, "grid": "normal", **wrong})


@pytest.mark.parametrize("lowering", [onnxruntime, tensorrt])
def test_backends_without_such_kernels_refuse_it_by_name(lowering: ModuleType) -> None:
    for level in (0, 4):
        scheme = IntBlock(kind="int_block", bits=4, block=32, accuracy_level=level, grid="normal")
        assert "4 bits of the normal grid" in str(lowering.lacks(scheme))
    assert tvm.lacks(scheme) is None


def test_a_checkpoints_own_codes_are_even_whatever_the_others_are_rounded_to() -> None:
    normal = IntBlock(kind="int_block", bits=4, block=32, accuracy_level=4, grid="normal")
    scheme = AsStored(kind="as_stored", otherwise=normal)
    held = scheme.held((4, 64))
    assert (scheme.held(None), held.label) == (normal, "int4 block 64 stored")
    assert isinstance(held, IntBlock)
    assert held.grid == "even"
