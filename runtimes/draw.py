"""Draws a token from logits after temperature, top-k, top-p and min-p, without sorting the vocabulary.

What is drawn from is exactly what a sort would leave. The k largest come from a partition. The head of top-p is found
by weighing bins of logits, from the largest down, and sorting the one bin in which the head ends. V vocabulary, N what
is left of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arriero.runtimes.backend import Floats, Ints

Doubles = NDArray[np.float64]
BLOCK = 512
BINS, PER_NAT = 4096, 64  # the last bin holds all that is e ** -64 times as likely as the likeliest, or less


def draw_token(
    logits: Floats,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    uniform: Callable[[], float],
) -> int:
    """Give a token id from `logits` [V], the largest of which is finite; `uniform` gives numbers from 0 up to 1."""
    if temperature == 0 or top_k == 1:
        return int(np.argmax(logits))
    ids: NDArray[Any] | None = None
    if top_k is not None and top_k < len(logits):
        ids = _largest(logits, top_k)
        logits = logits[ids]
    # float64 keeps the cumulative sum of a large vocabulary exact enough
    depth = logits.astype(np.float64)
    depth -= depth.max()
    with np.errstate(over="ignore"):  # next to no temperature leaves the others no chance
        depth /= temperature
    weights = np.exp(depth)
    left: NDArray[Any] | None = None
    if top_p is not None and top_p < 1:
        left = _head(depth, weights, top_p)
    if min_p:
        left = np.flatnonzero(weights >= min_p) if left is None else left[weights[left] >= min_p]
    drawn = _draw(weights if left is None else weights[left], uniform())
    for chosen in (left, ids):
        drawn = drawn if chosen is None else int(chosen[drawn])
    return drawn


def top_log_probabilities(logits: Floats, count: int) -> tuple[Ints, NDArray[Any], float]:
    """The `count` likeliest ids of `logits` [V], likeliest first, their log-probabilities, and the log-sum-exp."""
    largest = float(logits.max())
    log_sum = largest + float(np.log(np.exp(logits - np.float64(largest)).sum()))
    ids = _largest(logits, count) if 0 < count < len(logits) else np.arange(len(logits) if count else 0)
    ids = ids[np.lexsort((ids, -logits[ids]))]
    return ids, logits[ids].astype(np.float64) - log_sum, log_sum


def _largest(logits: Floats, count: int) -> Ints:
    """The ids of the `count` largest of `logits` [V]; of equal ones the lowest ids, as a stable sort has it."""
    least = np.partition(logits, len(logits) - count)[len(logits) - count]
    above = np.flatnonzero(logits > least)
    return np.concatenate([above, np.flatnonzero(logits == least)[: count - len(above)]])


def _head(depth: Doubles, weights: Doubles, top_p: float) -> Ints:
    """The fewest likeliest of N entries whose share of all `weights` reaches `top_p`; `depth` are their logarithms."""
    total = float(weights.sum())
    needed = top_p * total
    # those below weigh less, all together, than half of what is left out at the end
    likely = np.flatnonzero(weights >= (1 - top_p) * total / (2 * len(weights)))
    bins = np.minimum(depth[likely] * -PER_NAT, BINS - 1).astype(np.intp)
    reached = np.cumsum(np.bincount(bins, weights[likely], minlength=BINS))
    last = min(int(np.searchsorted(reached, needed)), int(bins.max()))
    edge = likely[bins == last]
    edge = edge[np.argsort(-depth[edge], kind="stable")]
    within = np.cumsum(weights[edge]) + (reached[last - 1] if last else 0.0)
    return np.concatenate([likely[bins < last], edge[: int(np.searchsorted(within, needed)) + 1]])


def _draw(weights: Doubles, uniform: float) -> int:
    """An index of `weights` [N], each as probable as it weighs: first its block, then the entry in that."""
    blocks = np.add.reduceat(weights, np.arange(0, len(weights), BLOCK))
    block, left = _reached(blocks, uniform * float(blocks.sum()))
    entry, _ = _reached(weights[block * BLOCK : (block + 1) * BLOCK], left)
    return block * BLOCK + entry


def _reached(weights: Doubles, target: float) -> tuple[int, float]:
    """The entry within which the sum of `weights` comes to `target`, and what of that is left to come to in it."""
    cumulative = np.cumsum(weights)
    entry = int(np.searchsorted(cumulative, target, side="right"))
    # the target may round up to the sum itself, which the last entry of any weight is the first to reach
    entry = min(entry, int(np.searchsorted(cumulative, cumulative[-1])))
    return entry, target - float(cumulative[entry - 1]) if entry else target
