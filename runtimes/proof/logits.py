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
from dataclasses import dataclass

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


@dataclass(frozen=True)
class WholeLogits:
    """The reference's logits f32 [T, V], all of them."""

    values: NDArray[np.float32]

    def figures(self, candidate: NDArray, near_tie: float) -> LogitFigures:
        """Every figure, exact. Raises ShapesDiffer."""
        sums = ErrorSums.of(self.values, candidate)
        assert sums.max_abs is not None
        kl = float(metrics.kl_per_token(self.values, candidate).sum())
        top = metrics.same_top_token(self.values, candidate, near_tie)
        return LogitFigures(sums, sums.max_abs, KlSums(kl, 0.0, kl, len(candidate)), top)


@dataclass(frozen=True)
class SampledLogits:
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

    def figures(self, candidate: NDArray, near_tie: float) -> LogitFigures:
        """Every figure: top token and lower bound exact, KL and relative L2 estimated. Raises ShapesDiffer."""
        shape = (len(self.head_ids), self.vocabulary)
        if candidate.shape != shape:
            raise ShapesDiffer(f"shapes differ: reference {list(shape)}, candidate {list(candidate.shape)}")
        kl = KlSums()
        for rows in metrics.row_blocks(candidate):
            kl += self._kl(rows, candidate)
        with np.errstate(invalid="ignore"):
            errors = [
                np.abs(np.take_along_axis(candidate, ids, 1).astype(np.float64) - kept)
                for ids, kept in ((self.head_ids, self.head_logits), (self.drawn_ids, self.drawn_logits))
            ]
        largest = float(np.maximum(*(error.max(initial=0.0) for error in errors)))
        return LogitFigures(self.sketched.errors(candidate), largest, kl, self._same_top(candidate, near_tie))

    def _kl(self, rows: slice, candidate: NDArray) -> KlSums:
        wide = candidate[rows].astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            log_q_sum = _log_sum(wide)[:, None]
            log_p = self.head_logits[rows] - self.log_sum[rows, None]  # [T, K]
            log_q = np.take_along_axis(wide, self.head_ids[rows], 1) - log_q_sum
            drawn = np.take_along_axis(wide, self.drawn_ids[rows], 1)
            np.put_along_axis(wide, self.head_ids[rows], -np.inf, 1)
            rest_q_sum = _log_sum(wide)
            rest_p, rest_q = self.rest_log_sum[rows] - self.log_sum[rows], rest_q_sum - log_q_sum[:, 0]  # log P, log Q
            mass = np.exp(rest_p)
            bound = np.sum(np.exp(log_p) * (log_p - log_q), 1) + mass * (rest_p - rest_q)
            log_r = (drawn - rest_q_sum[:, None]) - (self.drawn_logits[rows] - self.rest_log_sum[rows, None])  # [T, N]
            terms = np.expm1(log_r) - log_r
            variance = mass**2 * terms.var(1, ddof=1) / DRAWN
            bound = np.maximum(bound, 0.0)  # rounding below zero; NaN stays NaN
            total = bound + mass * terms.mean(1)
        return KlSums(float(total.sum()), float(variance.sum()), float(bound.sum()), len(total))

    def _same_top(self, candidate: NDArray, near_tie: float) -> Agreement:
        finite = np.isfinite(candidate).all(-1)
        tie = finite & (self.head_logits[:, 0].astype(np.float64) - self.head_logits[:, 1] < near_tie)
        same = (self.head_ids[:, 0] == candidate.argmax(-1)) & finite
        return metrics.agreement(same, tie, int((~finite).sum()))


def _log_sum(values: NDArray) -> NDArray[np.float64]:
    """Log-sum-exp over the last axis, in float64."""
    wide = values.astype(np.float64)
    largest = wide.max(-1, keepdims=True)
    total: NDArray[np.float64] = largest[..., 0] + np.log(np.exp(wide - largest).sum(-1))
    return total


def keep_logits(logits: NDArray[np.float32], seed: int, label: str) -> WholeLogits | SampledLogits:
    """What a record keeps of logits f32 [T, V]."""
    return WholeLogits(logits) if logits.shape[1] <= WHOLE_VOCABULARY else SampledLogits.draw(logits, seed, label)
