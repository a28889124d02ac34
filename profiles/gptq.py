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
from arriero.profiles.input_factor import InputFactor
from arriero.profiles.piecewise import piecewise
from arriero.profiles.quantize import Quantized, check_weight, half_scales, pack

# Shares of the largest magnitude that a block's scale is tried at; below 0.6 none was ever chosen.
CLIPS = np.linspace(0.6, 1.05, 19, dtype=np.float32)
PANEL, STRIP = 256, 16  # columns whose updates are applied at once: to the rest of the matrix, to their own panel
ROWS = 1024  # rows that are rounded at a time: none depends on another, and these stay in a processor's cache
SEARCHED = 1 << 16  # elements whose scales are searched at a time, likewise


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

    The errors that are passed on say what the rounding costs: with U the factor, weight - rounded = errors U, and
    U H Uᵀ = 1, so that the sum over their squares is the error of the outputs under the damped moments.
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
    order, upper, block = factor.order, factor.upper, weight.shape[1] // scales.shape[1]
    # as all below: a column lies together
    steps_of = np.ascontiguousarray(scales.T)
    divisors_of = np.where(steps_of == 0, np.float32(1), steps_of)
    rest = weight.T[order]
    error = 0.0
    for start in range(0, len(rest), PANEL):
        stop = min(start + PANEL, len(rest))
        errors, rounded = np.empty((2, stop - start, rest.shape[1]), np.float32)
        blocks = order[start:stop] // block
        for strip in range(start, stop, STRIP):
            end = min(strip + STRIP, stop)
            for column in range(strip, end):
                at, of = column - start, blocks[column - start]
                grid.round(rest[column] / divisors_of[of], out=rounded[at])
                errors[at] = (rest[column] - rounded[at] * steps_of[of]) / upper[column, column]
                rest[column + 1 : end] -= upper[column, column + 1 : end, None] * errors[at]
            rest[end:stop] -= upper[strip:end, end:stop].T @ errors[strip - start : end - start]
        rest[stop:] -= upper[start:stop, stop:].T @ errors
        columns = order[start:stop]
        levels[:, columns] = rounded.T
        lost = weight[:, columns].T - rounded * steps_of[blocks]
        for squares, times in ((errors, 1.0), (lost, -factor.added)):
            error += times * float(np.sum(np.square(squares, out=squares), dtype=np.float64))
    return error


def search_scales(
    weight: NDArray[np.float32], importance: NDArray[np.float64], *, grid: Grid, block: int, name: str
) -> NDArray[np.float32]:
    """Per block of `weight` [N, K] the scale [N, J] of least squared rounding error weighted by `importance` [K].

    Both signs are tried, because the levels reach further down than up. All are numbers that float16 holds. An
    all-zero block (or one whose scale would be no normal float32) gets `idle_scale`. Raises as `quantize` does where
    one is too large.
    """
    count, features = weight.shape
    weights = np.ascontiguousarray(importance.astype(np.float32).reshape(-1, block).T)[:, None]  # [block, 1, J]
    scales = np.empty((count, features // block), np.float32)
    for start in range(0, count, rows := max(1, SEARCHED // features)):
        piece = weight[start : start + rows].reshape(-1, features // block, block)
        # an element of all blocks lies together, so that each operation is a long one
        blocks = np.ascontiguousarray(piece.transpose(2, 0, 1))
        scales[start : start + rows] = _search(blocks, weights, grid, name)
    return scales


def _search(blocks: NDArray[np.float32], weights: NDArray[np.float32], grid: Grid, name: str) -> NDArray[np.float32]:
    """The scales [n, J] of blocks [block, n, J] whose elements weigh `weights` [block, 1, J]."""
    largest = np.abs(blocks).max(0)
    usable = largest / np.float32(grid.reach) >= np.finfo(np.float32).tiny / CLIPS[0]
    widest = np.where(usable, largest, 1).astype(np.float32)
    best, scales = np.full(largest.shape, np.inf, np.float32), np.full_like(largest, grid.idle_scale)
    off = np.empty_like(blocks)
    for clip in CLIPS:
        positive = half_scales(widest * np.float32(clip / grid.reach), top=grid.high, name=name)
        for step in (positive, -positive):
            np.divide(blocks, step, out=off)
            grid.round(off, out=off)
            np.subtract(blocks, np.multiply(off, step, out=off), out=off)
            error = np.multiply(np.square(off, out=off), weights, out=off).sum(0)
            better = usable & (error < best)
            np.copyto(best, error, where=better)
            np.copyto(scales, step, where=better)
    return scales


def output_error(weight: NDArray[np.float32], rounded: NDArray[np.float32], moment: NDArray[np.float64]) -> float:
    """Squared error of the outputs over the inputs behind `moment`: sum over rows of e H eᵀ, e = weight - rounded.

    Products are in float32, of which a comparison needs no more; their sum is in float64.
    """
    inputs, total = moment.astype(np.float32), 0.0
    for start in range(0, len(weight), ROWS):
        error = weight[start : start + ROWS] - rounded[start : start + ROWS]
        total += float(np.sum((error @ inputs) * error, dtype=np.float64))
    return total
