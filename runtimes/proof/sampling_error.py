"""How far a figure over drawn cases may lie from that over others: standard errors, with cases as what was drawn.

A case's tokens are alike, so that tokens by themselves would make errors too small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 200


def ratio_error(sums: ArrayLike, sizes: ArrayLike) -> float | None:
    """Standard error of the sum of `sums` over that of `sizes`, one of each for a case; None of a single case.

    W. G. Cochran, Sampling Techniques, 1977, 6.4. NaN where a sum is infinite, or nothing has a size.
    """
    above, below = np.asarray(sums, np.float64), np.asarray(sizes, np.float64)
    if len(above) < 2:
        return None
    with np.errstate(invalid="ignore", divide="ignore"):
        off = above - above.sum() / below.sum() * below
        return float(math.sqrt(len(above) / (len(above) - 1)) * np.linalg.norm(off) / below.sum())


def mean_error(cases: Sequence[NDArray[np.float64]]) -> float | None:
    """Standard error of the mean over all tokens of `cases`, an array each; None of a single case."""
    return ratio_error([case.sum() for case in cases], [len(case) for case in cases])


def quantile_errors(cases: Sequence[NDArray[np.float64]], shares: Sequence[float]) -> list[float] | None:
    """Standard errors of the quantiles `shares` over all tokens of `cases`, an array each; None of a single case.

    As many cases are drawn anew, RESAMPLES times, the same in every run (B. Efron and R. J. Tibshirani, An Introduction
    to the Bootstrap, 1993, 6). NaN where a token is infinite.
    """
    count = len(cases)
    if count < 2:
        return None
    values = np.concatenate(cases)
    order = np.argsort(values)
    values, owner = values[order], np.repeat(np.arange(count), [len(case) for case in cases])[order]
    draw, found = np.random.default_rng(0), np.empty((RESAMPLES, len(shares)))
    for row in found:
        upto = np.cumsum(np.bincount(draw.integers(0, count, count), minlength=count)[owner])
        row[:] = values[np.searchsorted(upto, np.multiply(shares, upto[-1]))]
    with np.errstate(invalid="ignore"):
        return [float(error) for error in found.std(axis=0, ddof=1)]


def told(error: float | None, cases: int, unit: str) -> str:
    """The error in words, to stand after others; nothing of a single case, and of cases that are all alike.

    `unit` is that of the figure, as thresholds name it; of a share the error is told in points.
    """
    if not error or math.isnan(error):
        return ""
    said = f"{100 * error:.2g} points" if unit == "share" else f"{error:.2g} {unit}"
    return f"; ± {said}, standard error over {cases} cases"
