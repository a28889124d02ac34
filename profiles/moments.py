"""What calibration sees of one linear layer's inputs: how many, how large, and their second moments.

Legend: n rows (tokens), K input features, N output features, H [K, K] = sum over inputs of x xᵀ.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from arriero.errors import ArrieroError

ROWS = 1024  # of an expert's inputs, held at once
AT_ONCE = 1024  # features whose moments with those from them on are added at a time
FEW = 3  # so many rows as features, divided by it, are less work than what they add up to, and less memory


class Moments:
    """Running statistics of rows [n, K]: `count`, `largest` f32 [K] (absmax), and their second moments H.

    Few rows stand for H themselves (`rows`); when there are more, H is what is kept. Without `second` there is neither,
    only count and range.
    """

    def __init__(self, features: int, second: bool = True) -> None:
        self.count = 0
        self.largest = np.zeros(features, np.float32)
        self._held: list[NDArray[np.float32]] | None = [] if second else None
        self._moment: NDArray[np.float64] | None = None
        self._whole = True  # one half of it is the other's mirror image, which is drawn when it is asked for

    @property
    def rows(self) -> NDArray[np.float32] | None:
        """All rows [n, K], where they are few; None where H is kept."""
        if self._held is None:
            return None
        if len(self._held) != 1:
            self._held = [np.concatenate([np.empty((0, len(self.largest)), np.float32), *self._held])]
        return self._held[0]

    @property
    def moment(self) -> NDArray[np.float64]:
        """H f64 [K, K], of few rows made for who asks."""
        if self._moment is None:
            if (rows := self.rows) is None:
                raise ValueError("second moments were not asked for")
            return rows.T.astype(np.float64) @ rows
        if not self._whole:
            for start in range(AT_ONCE, len(self._moment), AT_ONCE):
                self._moment[start : start + AT_ONCE, :start] = self._moment[:start, start : start + AT_ONCE].T
            self._whole = True
        return self._moment

    @property
    def diagonal(self) -> NDArray[np.float64]:
        """The diagonal f64 [K] of H."""
        if (rows := self.rows) is None:
            return np.diagonal(self.moment)
        return np.einsum("nk,nk->k", rows, rows, dtype=np.float64)

    def output_error(self, off: NDArray[np.float32]) -> float:
        """Squared error of a layer's outputs over all inputs where its weights are `off` [N, K]: trace of off H offᵀ.

        Products are in float32, of which a comparison needs no more; their sum is in float64.
        """
        if (rows := self.rows) is None:
            changed = off @ self.moment.astype(np.float32)
            return float(np.sum(np.multiply(changed, off, out=changed), dtype=np.float64))
        changed = off @ rows.T
        return float(np.sum(np.square(changed, out=changed), dtype=np.float64))

    def add(self, rows: NDArray[np.float32]) -> None:
        """Take in `rows` [n, K], which must be finite (see `check_finite`)."""
        self.count += len(rows)
        if not len(rows):
            return
        self.largest = np.maximum(self.largest, np.abs(rows).max(0))
        if self._held is not None:
            self._held.append(rows.copy())
            if self.count * FEW <= len(self.largest):
                return
            rows, self._held = np.concatenate(self._held), None
            self._moment = np.zeros((len(self.largest), len(self.largest)), np.float64)
        if self._moment is not None:
            self._whole = False
            for start in range(0, len(self.largest), AT_ONCE):
                self._moment[start : start + AT_ONCE, start:] += rows.T[start : start + AT_ONCE] @ rows[:, start:]


def check_finite(
    rows: NDArray[np.float32], where: str, samples: Sequence[str] | str, what: str = "calibration sample"
) -> None:
    """Refuse activations [n, K] that are not finite; `samples` names the sample of each row, or of all; `what` it is.

    `where` names the layer and the input or expert. A model that overflows here has no statistics worth keeping.
    """
    broken = ~np.isfinite(rows).all(-1)
    if not broken.any():
        return
    first = int(np.flatnonzero(broken)[0])
    sample = samples if isinstance(samples, str) else samples[first]
    kind = "NaN" if np.isnan(rows[first]).any() else "infinite"
    raise ArrieroError(
        f"{int(broken.sum())} of {len(rows)} activation rows are not finite (the first is {kind})",
        where=f"{where}, {what} {sample}",
        expected="finite activations in the float32 reference",
        remedy="Check the checkpoint (`arriero plan` reads its headers), or leave this sample out",
    )
