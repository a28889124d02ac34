"""A tensor of normal numbers that are drawn from a seed when rows are read: any rows, in any pieces, give the same.

Philox counts: block c of a key is 16 random numbers of 16 bits, whatever was read before. Each of them selects one of
65,536 quantiles of the normal distribution, which are already scaled and rounded to bf16.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from arriero.graphs.sources.made_weight import MadeWeight

DRAWING = 1  # raised with every change of what a seed gives
QUANTILES = 1 << 16
PER_BLOCK, PER_WORD = 16, 4  # numbers of 16 bits
CHUNK = 1 << 18  # numbers that are drawn together, a multiple of PER_BLOCK


def drawn_weight(name: str, shape: Sequence[int], mean: float, deviation: float, seed: int, stored: str) -> MadeWeight:
    """The tensor `name` in bf16, normal with this mean and standard deviation; `stored` names it in errors."""
    # Not Python's own hash, which differs from process to process.
    key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:16], "little")
    row = math.prod(shape[1:])

    def make(start: int, stop: int) -> NDArray[np.uint16]:
        bits = draw_bits(key, start * row, stop * row, normal_quantiles(mean, deviation))
        return bits.reshape(stop - start, *shape[1:])

    return MadeWeight(name, tuple(shape), "BF16", stored, "bf16", make)


def draw_bits(key: int, start: int, stop: int, table: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """Numbers `start` to `stop` of the stream of `key`, each replaced by the entry of `table` that it selects."""
    block, before = divmod(start, PER_BLOCK)
    stream = np.random.Philox(key=key, counter=block)
    bits = np.empty(stop - start, np.uint16)
    for chunk in range(-before, len(bits), CHUNK):
        numbers = min(CHUNK, len(bits) - chunk)
        drawn = stream.random_raw(-(-numbers // PER_WORD)).view(np.uint16)[:numbers]
        first = max(chunk, 0)
        # every number is an index of the table; without this mode `take` copies its output
        np.take(table, drawn[first - chunk :], out=bits[first : chunk + numbers], mode="clip")
    return bits


@lru_cache(maxsize=32)
def normal_quantiles(mean: float, deviation: float) -> NDArray[np.uint16]:
    """The bf16 bits of the quantiles in the middle of 65,536 equal shares of a normal distribution."""
    values = (mean + deviation * _standard_quantiles()).astype(np.float32)
    return values.astype(ml_dtypes.bfloat16).view(np.uint16)


@lru_cache(maxsize=1)
def _standard_quantiles() -> NDArray[np.float64]:
    normal = NormalDist()
    upper = np.array([normal.inv_cdf((number + 0.5) / QUANTILES) for number in range(QUANTILES // 2, QUANTILES)])
    return np.concatenate([-upper[::-1], upper])
