"""What a record keeps of the reference's logits, and every figure of a candidate's that follows from it.

A vocabulary of up to `WHOLE_VOCABULARY` is kept whole, and all figures are exact. Of a larger one, each token keeps its
`HEAD` largest logits, the log-sum-exp of all and of the rest, and `DRAWN` ids drawn from the reference's own
distribution over the rest, with their logits.

KL(p || q) splits exactly into head and rest. With P and Q the masses of the rest under p and q, and r = (q/Q) / (p/P):

    KL = sum over the head of p (log p - log q)  +  P log(P / Q)  +  P * E[r - 1 - log r],  ids drawn from p/P

The first two terms are the log-sum inequality's lower bound, exact from what is kept. The last is its mean over the
drawn ids: E[r] is 1, so `r - 1` changes no expectation, but it makes each term non-negative and of second order in the
difference, where the plain mean of log p - log q is of first order and would drown a small KL. The estimate is
unbiased; its variance comes from the spread of the drawn terms of each token. The largest error is that over the kept
logits, a lower bound of the true one; relative L2 comes from a sketch.
Legend: T tokens, V vocabulary, K = HEAD, N = DRAWN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from arriero.runtimes.proof import metrics
from arriero.runtimes.proof.metrics import Agreement, ErrorSums, ShapesDiffer
from arriero.runtimes.proof.sketch import SketchedArray, stream

WHOLE_VOCABULARY = 4096
HEAD, DRAWN = 256, 64


@dataclass(frozen=True)
class KlSums:
    """KL over tokens in nats: sum of the estimates, their variance, the sum of the lower bounds."""

    total: float = 0.0
    variance: float = 0.0
    bound: float = 0.0
    tokens: int = 0

    def __add__(self, other: KlSums) -> KlSums:
        return KlSums(
            self.total + other.total,
            self.variance + other.variance,
            self.bound + other.bound,
            self.tokens + other.tokens,
        )

    @property
    def mean(self) -> float:
        """Mean over the tokens."""
        return self.total / self.tokens

    @property
    def error(self) -> float:
        """Standard error of `mean`, as an estimate of the exact mean over these very tokens; 0 where all is exact."""
        return math.sqrt(self.variance) / self.tokens

    @property
    def bound_mean(self) -> float:
        """Mean of the lower bounds."""
        return self.bound / self.tokens


@dataclass(frozen=True)
class LogitFigures:
    """A candidate's logits of one case against the reference's; `largest_error` is over the logits that are kept."""

    sums: ErrorSums
    largest_error: float
    kl: KlSums
    top: Agreement
    token_kl: NDArray[np.float64]  # [T] in nats


class LogitMeter(Protocol):
    """Measures a candidate's logits [T, V] that come in pieces, in order."""

    def add(self, rows: NDArray) -> None:
        """Go on with the logits `rows` of the next tokens. Raises ShapesDiffer."""
        ...

    def figures(self) -> LogitFigures:
        """Every figure over the pieces. Raises ShapesDiffer where they are less than the reference has."""
        ...


class _Measured(Protocol):
    def meter(self, near_tie: float) -> LogitMeter: ...

    def figures(self, candidate: NDArray, near_tie: float) -> LogitFigures:
        """Every figure of logits [T, V] that are there at once. Raises ShapesDiffer."""
        meter = self.meter(near_tie)
        meter.add(candidate)
        return meter.figures()


@dataclass(frozen=True)
class WholeLogits(_Measured):
    """The reference's logits f32 [T, V], all of them; every figure is exact."""

    values: NDArray[np.float32]

    def meter(self, near_tie: float) -> WholeLogitMeter:
        """Measures a candidate's."""
        return WholeLogitMeter(self.values, near_tie)


class WholeLogitMeter:
    """Figures of logits against the reference's, all of them."""

    def __init__(self, reference: NDArray[np.float32], near_tie: float) -> None:
        self._reference, self._near_tie, self._tokens = reference, near_tie, 0
        self._sums, self._top, self._token_kl = ErrorSums(), Agreement(), [np.zeros(0)]

    def add(self, rows: NDArray) -> None:
        """Go on with `rows` [t, V]."""
        known = self._reference[self._tokens : self._tokens + len(rows)]
        self._sums += ErrorSums.of(known, rows)
        self._token_kl.append(metrics.kl_per_token(known, rows))
        self._top += metrics.same_top_token(known, rows, self._near_tie)
        self._tokens += len(rows)

    def figures(self) -> LogitFigures:
        """All of them, exact."""
        _check_tokens(self._reference.shape, self._tokens)
        assert self._sums.max_abs is not None
        kl = np.concatenate(self._token_kl)
        total = float(kl.sum())
        return LogitFigures(self._sums, self._sums.max_abs, KlSums(total, 0.0, total, len(kl)), self._top, kl)


@dataclass(frozen=True)
class SampledLogits(_Measured):
    """What is kept of the logits [T, V] of a large vocabulary. Raises ValueError for one that the head would fill."""

    vocabulary: int
    head_ids: NDArray[np.int32]  # [T, K] by falling logit
    head_logits: NDArray[np.float32]  # [T, K]
    drawn_ids: NDArray[np.int32]  # [T, N] with replacement
    drawn_logits: NDArray[np.float32]  # [T, N]
    log_sum: NDArray[np.float64]  # [T] log-sum-exp of all
    rest_log_sum: NDArray[np.float64]  # [T] log-sum-exp of all but the head
    sketched: SketchedArray  # of the whole [T, V]

    @classmethod
    def draw(cls, logits: NDArray[np.float32], seed: int, label: str) -> SampledLogits:
        """Keep of the reference's `logits` f32 [T, V], V above `HEAD`, what the class holds; draws are of `seed`."""
        tokens, vocabulary = logits.shape
        if vocabulary <= HEAD:
            raise ValueError(f"a vocabulary of {vocabulary} is kept whole")
        raw = np.asarray(stream(seed, f"{label} drawn").random_raw(tokens * DRAWN), np.uint64)
        uniform = ((raw >> np.uint64(11)).astype(np.float64) / float(1 << 53)).reshape(tokens, DRAWN)
        head_ids, drawn_ids = np.empty((tokens, HEAD), np.int32), np.empty((tokens, DRAWN), np.int32)
        log_sum, rest_log_sum = np.empty(tokens), np.empty(tokens)
        for token, row in enumerate(logits):
            head = np.argpartition(-row, HEAD - 1)[:HEAD]
            head_ids[token] = head[
                np.lexsort((head, -row[head]))
            ]  # of equal logits, the lower id first, as argmax does
            rest = row.astype(np.float64)
            rest[head] = -np.inf
            largest = rest.max()
            cumulative = np.cumsum(np.exp(rest - largest))
            rest_log_sum[token] = largest + math.log(cumulative[-1])
            log_sum[token] = np.logaddexp(rest_log_sum[token], _log_sum(row[head]))
            drawn_ids[token] = np.searchsorted(cumulative, uniform[token] * cumulative[-1], side="right")
        return cls(
            vocabulary,
            head_ids,
            np.take_along_axis(logits, head_ids, 1),
            drawn_ids,
            np.take_along_axis(logits, drawn_ids, 1),
            log_sum,
            rest_log_sum,
            SketchedArray.of(logits, seed, f"{label} logits"),
        )

    def meter(self, near_tie: float) -> SampledLogitMeter:
        """Measures a candidate's: top token and lower bound exact, KL and relative L2 estimated."""
        return SampledLogitMeter(self, near_tie)


class SampledLogitMeter:
    """Figures of logits against what is kept of the reference's."""

    def __init__(self, reference: SampledLogits, near_tie: float) -> None:
        self._reference, self._near_tie, self._tokens = reference, near_tie, 0
        self._sketch = reference.sketched.meter()
        self._kl, self._top, self._largest, self._token_kl = KlSums(), Agreement(), 0.0, [np.zeros(0)]

    def add(self, rows: NDArray) -> None:
        """Go on with `rows` [t, V]."""
        first = self._tokens
        self._tokens += len(rows)
        shape = (len(self._reference.head_ids), self._reference.vocabulary)
        if rows.shape[1:] != shape[1:] or self._tokens > shape[0]:
            raise ShapesDiffer(f"shapes differ: reference {list(shape)}, candidate {[self._tokens, *rows.shape[1:]]}")
        self._sketch.add(rows)
        for block in metrics.row_blocks(rows):
            kept = slice(first + block.start, first + min(block.stop, len(rows)))
            self._add(kept, rows[block].astype(np.float64))

    def figures(self) -> LogitFigures:
        """All of them."""
        _check_tokens((len(self._reference.head_ids), self._reference.vocabulary), self._tokens)
        kl = np.concatenate(self._token_kl)
        return LogitFigures(self._sketch.errors(), self._largest, self._kl, self._top, kl)

    def _add(self, kept: slice, wide: NDArray[np.float64]) -> None:
        """The block `wide` [t, V] of a candidate's logits, of the tokens `kept`; it is written over."""
        reference = self._reference
        head_ids, drawn_ids = reference.head_ids[kept], reference.drawn_ids[kept]
        head_logits, drawn_logits = reference.head_logits[kept], reference.drawn_logits[kept]
        head, drawn = (np.take_along_axis(wide, ids, 1) for ids in (head_ids, drawn_ids))
        finite = np.isfinite(wide).all(-1)
        tie = finite & (head_logits[:, 0].astype(np.float64) - head_logits[:, 1] < self._near_tie)
        same = (head_ids[:, 0] == wide.argmax(-1)) & finite
        self._top += metrics.agreement(same, tie, int((~finite).sum()))
        with np.errstate(invalid="ignore"):
            errors = np.abs(head - head_logits).max(initial=0.0), np.abs(drawn - drawn_logits).max(initial=0.0)
        self._largest = float(np.maximum(self._largest, np.maximum(*errors)))  # keeps a NaN
        self._add_kl(kept, wide, head, drawn)

    def _add_kl(self, kept: slice, wide: NDArray, head: NDArray, drawn: NDArray) -> None:
        reference = self._reference
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            log_q_sum = _log_sum(wide)[:, None]
            log_p = reference.head_logits[kept] - reference.log_sum[kept, None]  # [T, K]
            log_q = head - log_q_sum
            np.put_along_axis(wide, reference.head_ids[kept], -np.inf, 1)
            rest_q_sum, rest_p_sum = _log_sum(wide), reference.rest_log_sum[kept]
            rest_p, rest_q = rest_p_sum - reference.log_sum[kept], rest_q_sum - log_q_sum[:, 0]  # log P, log Q
            mass = np.exp(rest_p)
            bound = np.sum(np.exp(log_p) * (log_p - log_q), 1) + mass * (rest_p - rest_q)
            log_r = (drawn - rest_q_sum[:, None]) - (reference.drawn_logits[kept] - rest_p_sum[:, None])  # [T, N]
            terms = np.expm1(log_r) - log_r
            variance = mass**2 * terms.var(1, ddof=1) / DRAWN
            bound = np.maximum(bound, 0.0)  # rounding below zero; NaN stays NaN
            total = bound + mass * terms.mean(1)
        self._kl += KlSums(float(total.sum()), float(variance.sum()), float(bound.sum()), len(total))
        self._token_kl.append(total)


def _log_sum(values: NDArray) -> NDArray[np.float64]:
    """Log-sum-exp over the last axis, in float64."""
    wide = values.astype(np.float64)
    largest = wide.max(-1, keepdims=True)
    total: NDArray[np.float64] = largest[..., 0] + np.log(np.exp(wide - largest).sum(-1))
    return total


def keep_logits(logits: NDArray[np.float32], seed: int, label: str) -> WholeLogits | SampledLogits:
    """What a record keeps of logits f32 [T, V]."""
    return WholeLogits(logits) if logits.shape[1] <= WHOLE_VOCABULARY else SampledLogits.draw(logits, seed, label)


def _check_tokens(shape: Sequence[int], tokens: int) -> None:
    if tokens != shape[0]:
        raise ShapesDiffer(f"shapes differ: reference {list(shape)}, candidate {[tokens, *shape[1:]]}")
