"""Calibrated rounding: integers and scales chosen for the least error of a layer's OUTPUT, not of its weights.

GPTQ (Frantar et al. 2022, "Accurate Post-Training Quantization for Generative Pre-trained Transformers"): columns are
rounded one after another, and the error of each is made up for by the columns still to come, as the inputs' second
moments allow. Scales are searched first, per block, for the least error weighted by those moments.
Legend: N output features, K input features, J = K / block, H [K, K] = sum over inputs of x xᵀ.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from arriero.profiles.quantize import Quantized, check_weight, pack

# Shares of the largest magnitude that a block's scale is tried at; below 0.6 none was ever chosen.
CLIPS = np.linspace(0.6, 1.05, 19, dtype=np.float32)
COLUMNS = 64  # columns whose updates are applied to the rest of the matrix at once


def gptq(
    weight: NDArray[np.float32],
    moment: NDArray[np.float64],
    *,
    bits: int,
    block: int,
    damping: float,
    name: str,
) -> Quantized:
    """Round `weight` f32 [N, K] for inputs with second moments `moment` [K, K].

    `damping` is the share of the mean diagonal that is added to the diagonal. Columns are taken in falling order of
    their moment ("act-order"). Raises as `quantize` does.
    """
    check_weight(weight, bits=bits, block=block, name=name)
    damped = _damped(moment, damping)
    scales = search_scales(weight, np.diagonal(damped), bits=bits, block=block)  # [N, J]
    order = np.argsort(-np.diagonal(damped), kind="stable")
    factor = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)])).T.astype(np.float32)  # upper, [K, K]
    steps = np.repeat(scales, block, -1)[:, order]
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    rest = weight[:, order].copy()
    integers = np.empty(weight.shape, np.float32)
    features = weight.shape[1]
    for start in range(0, features, COLUMNS):
        stop = min(start + COLUMNS, features)
        errors = np.empty((len(weight), stop - start), np.float32)
        for column in range(start, stop):
            step, value = steps[:, column], rest[:, column]
            integers[:, column] = np.clip(np.rint(value / step), low, high)
            errors[:, column - start] = (value - integers[:, column] * step) / factor[column, column]
            rest[:, column:stop] -= errors[:, column - start, None] * factor[column, column:stop]
        rest[:, stop:] -= errors @ factor[start:stop, stop:]
    back = np.empty_like(integers)
    back[:, order] = integers
    return pack(back, scales, bits=bits, block=block)


def search_scales(
    weight: NDArray[np.float32], importance: NDArray[np.float64], *, bits: int, block: int
) -> NDArray[np.float32]:
    """Per block of `weight` [N, K] the scale [N, J] of least squared rounding error weighted by `importance` [K].

    Both signs are tried, because the integers reach one further down than up. All-zero blocks get scale 1.
    """
    rows, features = weight.shape
    blocks = weight.reshape(rows, features // block, block)
    weights = importance.astype(np.float32).reshape(1, features // block, block)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    largest = np.abs(blocks).max(-1)
    usable = largest / np.float32(-low) >= np.finfo(np.float32).tiny / CLIPS[0]
    widest = np.where(usable, largest, 1).astype(np.float32)
    best, scales = np.full(largest.shape, np.inf, np.float32), np.ones_like(largest)
    for sign in (1, -1):
        for clip in CLIPS:
            step = widest * np.float32(sign * clip / -low)
            rounded = np.clip(np.rint(blocks / step[..., None]), low, high) * step[..., None]
            error = (weights * (blocks - rounded) ** 2).sum(-1)
            better = usable & (error < best)
            best[better], scales[better] = error[better], step[better]
    return scales


def output_error(weight: NDArray[np.float32], rounded: NDArray[np.float32], moment: NDArray[np.float64]) -> float:
    """Squared error of the outputs over the inputs behind `moment`: sum over rows of e H eᵀ, e = weight - rounded."""
    error = (weight - rounded).astype(np.float64)
    return float(np.sum((error @ moment) * error))


def _damped(moment: NDArray[np.float64], damping: float) -> NDArray[np.float64]:
    """`moment` made safely positive definite; features that were never active count as barely active."""
    mean = float(np.mean(np.diagonal(moment)))
    return moment + np.eye(len(moment)) * (damping * mean if mean > 0 else 1.0)
