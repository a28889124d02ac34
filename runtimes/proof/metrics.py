"""How far a candidate's numbers are from the reference's: pure numpy, float64 inside, NaN never agrees.

T tokens, V vocabulary, k experts per token. Every function takes the reference first. A value that is not finite
on either side makes the metric NaN (a difference with an infinity may stay infinite); `meets` refuses both, so a
broken candidate can never pass because `NaN > threshold` is false.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TWO_SIDED = 1.959964  # standard errors on both sides of an estimate beyond which 5 % lie
NEAR_TIE = 1e-3  # natural-log units: below this margin the two best choices are within 0.1 % of equally likely
BYTES_AT_ONCE = 8 << 20  # of logits turned into float64 at once: 5 tokens of a vocabulary of 202,048


class ShapesDiffer(ValueError):
    """Two arrays that should be compared are not of one shape; nothing is ever broadcast."""


@dataclass(frozen=True)
class ErrorSums:
    """Sums from which relative L2, SNR and the largest error follow; `+` joins the sums of two pieces.

    Of a sketch (`sketch.py`) the noise is an estimate with a variance, and the largest error is not known.
    """

    signal: float = 0.0  # sum of reference^2
    noise: float = 0.0  # sum of (candidate - reference)^2
    max_abs: float | None = 0.0  # max |candidate - reference|
    count: int = 0
    variance: float = 0.0  # of `noise`

    @classmethod
    def of(cls, reference: NDArray, candidate: NDArray) -> ErrorSums:
        """Sums over two arrays of one shape. Raises ShapesDiffer."""
        _same_shape(reference, candidate)
        if not reference.size:
            return cls()
        ref = reference.astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            error = candidate.astype(np.float64) - ref
            return cls(
                float(np.sum(ref * ref)), float(np.sum(error * error)), float(np.max(np.abs(error))), reference.size
            )

    def __add__(self, other: ErrorSums) -> ErrorSums:
        largest = None
        if self.max_abs is not None and other.max_abs is not None:
            largest = float(np.maximum(self.max_abs, other.max_abs))  # unlike max(), keeps a NaN on either side
        return ErrorSums(
            self.signal + other.signal,
            self.noise + other.noise,
            largest,
            self.count + other.count,
            self.variance + other.variance,
        )

    @property
    def relative_l2(self) -> float:
        """`|candidate - reference|_2 / |reference|_2`; 0 when both are zero, inf when only the reference is."""
        if math.isnan(self.noise) or not math.isfinite(self.signal):
            return math.nan
        if self.signal == 0.0:
            return 0.0 if self.noise == 0.0 else math.inf
        return math.sqrt(self.noise / self.signal)

    @property
    def relative_l2_error(self) -> float:
        """Standard error of `relative_l2`; 0 where it is exact."""
        if not self.variance:
            return 0.0
        return self.relative_l2 * math.sqrt(self.variance) / (2 * self.noise)

    @property
    def snr_db_error(self) -> float:
        """Standard error of `snr_db` in dB; 0 where it is exact."""
        return 10 / math.log(10) * math.sqrt(self.variance) / self.noise if self.variance else 0.0

    @property
    def snr_db(self) -> float:
        """`10 log10(sum reference^2 / sum error^2)` in dB; inf when identical, -inf when there is no signal left."""
        relative = self.relative_l2
        if math.isnan(relative):
            return math.nan
        if relative == 0.0:
            return math.inf
        return -math.inf if math.isinf(relative) else -20.0 * math.log10(relative)


def relative_l2(reference: NDArray, candidate: NDArray) -> float:
    """`|candidate - reference|_2 / |reference|_2` over two arrays of one shape."""
    return ErrorSums.of(reference, candidate).relative_l2


def snr_db(reference: NDArray, candidate: NDArray) -> float:
    """Signal-to-noise ratio `10 log10(sum reference^2 / sum error^2)` in dB over two arrays of one shape."""
    return ErrorSums.of(reference, candidate).snr_db


def max_abs_error(reference: NDArray, candidate: NDArray) -> float | None:
    """`max |candidate - reference|` over two arrays of one shape; NaN if any difference is NaN; 0 when empty."""
    return ErrorSums.of(reference, candidate).max_abs


def row_blocks(logits: NDArray) -> Iterator[slice]:
    """Slices over the tokens of logits [T, V], each of at most `BYTES_AT_ONCE` in float64, of one token at least."""
    at_once = max(1, BYTES_AT_ONCE // (8 * max(logits.shape[1], 1)))
    for start in range(0, len(logits), at_once):
        yield slice(start, start + at_once)


def kl_per_token(reference: NDArray, candidate: NDArray) -> NDArray[np.float64]:
    """KL(reference || candidate) of the softmaxes, in nats: logits [T, V] twice -> [T].

    `sum_v p_v (log p_v - log q_v)`, both log-softmaxes in float64. Rounding below zero is cut; NaN stays NaN.
    """
    _same_shape(reference, candidate)
    out = np.empty(len(reference), np.float64)
    for rows in row_blocks(reference):
        log_p, log_q = _log_softmax(reference[rows]), _log_softmax(candidate[rows])
        with np.errstate(invalid="ignore"):
            out[rows] = np.maximum(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1), 0.0)
    return out


@dataclass(frozen=True)
class Agreement:
    """How often two sides chose alike; choices the reference itself found a near tie are counted apart."""

    tokens: int = 0
    near_ties: int = 0  # tokens whose reference margin is below the tolerance
    near_tie_flips: int = 0  # of those, how many the candidate chose otherwise
    real_flips: int = 0  # clear choices that the candidate made otherwise
    nonfinite: int = 0  # tokens for which a side has no finite numbers to choose by

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(
            self.tokens + other.tokens,
            self.near_ties + other.near_ties,
            self.near_tie_flips + other.near_tie_flips,
            self.real_flips + other.real_flips,
            self.nonfinite + other.nonfinite,
        )

    @property
    def clear(self) -> int:
        """Tokens whose choice is not a near tie."""
        return self.tokens - self.near_ties

    @property
    def fraction(self) -> float | None:
        """`1 - real_flips / clear`; None when no choice is clear; NaN when a token had no finite numbers."""
        if self.nonfinite:
            return math.nan
        return 1.0 - self.real_flips / self.clear if self.clear else None

    def __str__(self) -> str:
        text = f"{self.real_flips} of {self.clear} clear choices differ"
        if self.near_ties:
            text += f"; apart: {self.near_tie_flips} of {self.near_ties} near ties"
        return text + (f"; {self.nonfinite} tokens not finite" if self.nonfinite else "")


def same_top_token(reference: NDArray, candidate: NDArray, near_tie: float = NEAR_TIE) -> Agreement:
    """Whether the largest logit is the same token: logits [T, V] twice, V >= 2.

    A token is a near tie when the reference's best minus second-best logit is below `near_tie`.
    """
    _same_shape(reference, candidate)
    if not len(reference):
        return Agreement()
    best = np.partition(reference, -2, axis=-1)[:, -2:].astype(np.float64)
    finite = np.isfinite(reference).all(axis=-1) & np.isfinite(candidate).all(axis=-1)
    with np.errstate(invalid="ignore"):
        tie = finite & (best[:, 1] - best[:, 0] < near_tie)
    same = (reference.argmax(axis=-1) == candidate.argmax(axis=-1)) & finite
    return agreement(same, tie, int((~finite).sum()))


def router_agreement(
    reference: NDArray, candidate: NDArray, margin: NDArray | None = None, near_tie: float = NEAR_TIE
) -> Agreement:
    """Whether tokens go to the same set of experts, in any order: expert ids [T, k] twice.

    `margin` [T] is the reference's k-th best minus (k+1)-th best router logit; without it no token is a near tie.
    """
    _same_shape(reference, candidate)
    same = (np.sort(reference, axis=-1) == np.sort(candidate, axis=-1)).all(axis=-1)
    tie = np.zeros(len(same), bool) if margin is None else np.asarray(margin).reshape(len(same)) < near_tie
    return agreement(same, tie, 0)


def common_prefix(reference: Sequence[int], candidate: Sequence[int]) -> float:
    """Length of the common prefix of two token sequences over the longer one's length; 1 when both are empty."""
    longest = max(len(reference), len(candidate))
    if not longest:
        return 1.0
    same = 0
    for left, right in zip(reference, candidate, strict=False):
        if left != right:
            break
        same += 1
    return same / longest


def accuracy_interval(right: int, count: int) -> tuple[float, float]:
    """The interval at 95 % confidence of an accuracy of which `right` of `count` cases were seen, at least one.

    E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22, 1927: unlike a standard
    error it stays honest at 0 and 100 %.
    """
    share = right / count
    spread = TWO_SIDED**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def meets(value: float, threshold: float, direction: str) -> bool:
    """Whether `value` is at most (`max`) or at least (`min`) `threshold`; NaN and the wrong infinity never do."""
    if math.isnan(value):
        return False
    if direction == "max":
        return value <= threshold and value != math.inf
    return value >= threshold and value != -math.inf


def agreement(same: NDArray, tie: NDArray, nonfinite: int) -> Agreement:
    """The sums over tokens [T] of which `same` chose alike and `tie` were near ties."""
    flips = ~same
    return Agreement(len(same), int(tie.sum()), int((flips & tie).sum()), int((flips & ~tie).sum()), nonfinite)


def _log_softmax(logits: NDArray) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        shifted = wide - wide.max(axis=-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _same_shape(reference: NDArray, candidate: NDArray) -> None:
    if reference.shape != candidate.shape:
        raise ShapesDiffer(f"shapes differ: reference {list(reference.shape)}, candidate {list(candidate.shape)}")
