"""Calibrated rounding: integers and scales chosen for the least error of a layer's OUTPUT, not of its weights.

GPTQ (Frantar et al. 2022, "Accurate Post-Training Quantization for Generative Pre-trained Transformers"): columns are
rounded one after another, and the error of each is made up for by the columns still to come, as the inputs' second
moments allow. Scales are searched first, per block, for the least error weighted by those moments, among what float16
holds.
Legend: N output features, K input features, J = K / block, H [K, K] = sum over inputs of x xᵀ.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from arriero.profiles.grids import Grid
from arriero.profiles.input_factor import PANEL, InputFactor
from arriero.profiles.piecewise import piecewise
from arriero.profiles.quantize import Quantized, check_weight, half_scales, pack

# Shares of the largest magnitude that a block's scale is tried at; below 0.6 none was ever chosen.
CLIPS = np.linspace(0.6, 1.05, 19, dtype=np.float32)
STRIP = 16  # columns whose errors are passed on to the rest of their panel at once
ROWS = 1024  # rows that are rounded at a time: none depends on another, and these stay in a processor's cache
SEARCHED = 1 << 18  # elements whose scales are searched at a time


def gptq(
    weight: NDArray[np.float32],
    factor: InputFactor,
    *,
    grid: Grid,
    block: int,
    name: str,
) -> tuple[Quantized, float]:
    """Round `weight` f32 [N, K] to levels of `grid` times a scale per block, for inputs with the second moments behind
    `factor`; give its `output_error` with it.

    Columns are taken in the factor's order. Raises as `quantize` does.
    """
    check_weight(weight, bits=grid.bits, block=block, name=name)
    scales = np.empty((len(weight), weight.shape[1] // block), np.float32)
    levels = np.empty(weight.shape, np.float32)

    def round_piece(rows: slice) -> float:
        scales[rows] = search_scales(weight[rows], factor.importance, grid=grid, block=block, name=name)
        return _round_columns(weight[rows], scales[rows], factor, grid, levels[rows])

    with piecewise() as each:
        error = sum(each(round_piece, len(weight), ROWS))
    return pack(levels, scales, bits=grid.bits, block=block, grid=grid.name), max(error, 0.0)


def _round_columns(
    weight: NDArray[np.float32],
    scales: NDArray[np.float32],
    factor: InputFactor,
    grid: Grid,
    levels: NDArray[np.float32],
) -> float:
    """The `levels` [n, K] of rows `weight` [n, K] at `scales` [n, J], and the error of their outputs."""
    # here, because Numba takes half a second to load, and a plan reads this file for its constants
    from arriero.profiles.compiled_loops import put_columns, round_strip, take_columns

    order, block, levels_of = factor.order, weight.shape[1] // scales.shape[1], grid.for_loops()
    # as all below: a column lies together
    steps_of, in_order = np.ascontiguousarray(scales.T), np.empty(weight.T.shape, np.float32)
    take_columns(weight, order, in_order)
    columns = factor.columns(in_order)
    for start in range(0, len(order), PANEL):
        panel = slice(start, min(start + PANEL, len(order)))
        rest, upper, of = columns.reach(panel), factor.upper(panel), order[panel] // block
        level, rounded, errors = np.empty((3, *rest.shape), np.float32)
        for first in range(0, len(rest), STRIP):
            strip, later = slice(first, first + STRIP), slice(first + STRIP, None)
            made = level[strip], rounded[strip], errors[strip]
            round_strip(rest[strip], steps_of, of[strip], upper[strip, strip], *levels_of, *made)
            rest[later] -= upper[strip, later].T @ errors[strip]
        put_columns(level, order[panel], levels)
        columns.leave(panel, rounded, errors)
    return columns.error()


def search_scales(
    weight: NDArray[np.float32], importance: NDArray[np.float64], *, grid: Grid, block: int, name: str
) -> NDArray[np.float32]:
    """Per block of `weight` [N, K] the scale [N, J] of least squared rounding error weighted by `importance` [K].

    Both signs are tried, because the levels reach further down than up. All are numbers that float16 holds. An
    all-zero block (or one whose scale would be no normal float32) gets `idle_scale`. Raises as `quantize` does where
    one is too large.
    """
    count, features = weight.shape
    weights = np.ascontiguousarray(importance.astype(np.float32).reshape(-1, block).T)
    scales = np.empty((count, features // block), np.float32)
    for start in range(0, count, rows := max(1, SEARCHED // features)):
        piece = weight[start : start + rows].reshape(-1, features // block, block)
        # an element of all blocks lies together, so that each operation is a long one
        blocks = np.ascontiguousarray(piece.transpose(2, 0, 1)).reshape(block, -1)
        scales[start : start + rows] = _search(blocks, weights, grid, name).reshape(len(piece), -1)
    return scales


def _search(blocks: NDArray[np.float32], weights: NDArray[np.float32], grid: Grid, name: str) -> NDArray[np.float32]:
    """The scales [M] of blocks [block, M] whose elements weigh `weights` [block, J]; M is a multiple of J."""
    from arriero.profiles.compiled_loops import search_steps

    largest = np.abs(blocks).max(0)
    usable = largest / np.float32(grid.reach) >= np.finfo(np.float32).tiny / CLIPS[0]
    widest = np.where(usable, largest, 1).astype(np.float32)
    steps = half_scales((CLIPS / np.float32(grid.reach))[:, None] * widest, top=grid.high, name=name)
    scales = np.full_like(largest, grid.idle_scale)
    search_steps(blocks, weights, steps, *grid.for_loops(), scales)
    scales[~usable] = grid.idle_scale
    return scales
