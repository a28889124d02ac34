"""What calibration sees of one linear layer's inputs: how many, how large, and their second moments.

Legend: n rows (tokens), K input features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from arriero.errors import ArrieroError

ROWS = 1024  # of an expert's inputs, held at once
AT_ONCE = 1024  # features whose moments with those from them on are added at a time


class Moments:
    """Running statistics of rows [n, K]: `count`, `largest` f32 [K] (absmax), and `moment` f64 [K, K] = sum of x xᵀ.

    Without `second` there is no moment, only count and range: nothing of K x K is held.
    """

    def __init__(self, features: int, second: bool = True) -> None:
        self.count = 0
        self.largest = np.zeros(features, np.float32)
        self._moment = np.zeros((features, features), np.float64) if second else None
        self._whole = True  # one half of it is the other's mirror image, which is drawn when it is asked for

    @property
    def moment(self) -> NDArray[np.float64]:
        """The second moments [K, K]."""
        if self._moment is None:
            raise ValueError("second moments were not asked for")
        if not self._whole:
            for start in range(AT_ONCE, len(self._moment), AT_ONCE):
                self._moment[start : start + AT_ONCE, :start] = self._moment[:start, start : start + AT_ONCE].T
            self._whole = True
        return self._moment

    def add(self, rows: NDArray[np.float32]) -> None:
        """Take in `rows` [n, K], which must be finite (see `check_finite`)."""
        self.count += len(rows)
        if len(rows):
            self.largest = np.maximum(self.largest, np.abs(rows).max(0))
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
