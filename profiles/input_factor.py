"""What GPTQ needs of a matrix's inputs: their inverse second moments, as a triangular factor, whole or in panels.

Matrices that read the same inputs share one.
Legend: n rows of a matrix, K its input features, C columns of a panel, t tokens, H [K, K] = sum over inputs of x xᵀ,
A = `added` on a diagonal, D = H + A, features in `order`; U upper triangular with UᵀU = D⁻¹.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from arriero.profiles.moments import Moments
from arriero.profiles.piecewise import Each, piecewise
from arriero.profiles.triangular import SMALL, inverse_factor

PANEL = 256  # columns whose errors are passed on to the rest of a matrix at once
# Moments of few tokens have correlations, the larger the fewer, that the next tokens have not. An expert has a few of a
# layer's tokens: so much of its diagonal is added for each input per token. What that gains: docs/performance.md.
EXPERTS_SHRINKAGE = 0.7
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


class Columns(Protocol):
    """A piece of a matrix, whose columns are rounded panel by panel."""

    def reach(self, panel: slice) -> Floats:
        """Its columns [C, n] of that panel after all errors before it were passed on; they may be written over."""

    def leave(self, panel: slice, rounded: Floats, errors: Floats) -> None:
        """Pass on that they are `rounded` [C, n] now, `errors` [C, n] by their factor; both may be written over."""

    def error(self) -> float:
        """Squared error of the outputs, when all panels were left."""


@dataclass(frozen=True)
class InputFactor(ABC):
    """D, and what rounding a panel of columns changes in the columns after it."""

    order: NDArray[np.int64]  # [K], falling by the moment ("act-order")
    importance: NDArray[np.float64]  # [K], the diagonal of D, features in their own order

    @staticmethod
    def of(seen: Moments, damping: float, shrinkage: float = 0.0) -> InputFactor:
        """Factor the second moments H of t tokens, with something added to the diagonal.

        That is `damping` times their mean diagonal, and `shrinkage` * K / t times each feature's own: H shrunk towards
        its diagonal, as Schäfer and Strimmer do with covariances of few samples (2005, "A Shrinkage Approach to
        Large-Scale Covariance Matrix Estimation", target D), by a share set before.
        """
        diagonal = seen.diagonal
        mean = float(np.mean(diagonal))
        # never active features count as barely active; without any input all are alike
        own = shrinkage * len(diagonal) / max(seen.count, 1) * diagonal
        added = own + damping * mean if mean > 0 else np.ones(len(diagonal))
        order = np.argsort(-diagonal, kind="stable")
        rows = seen.rows
        if rows is None:
            return _whole_factor(order, diagonal + added, added[order], seen.moment)
        return _panel_factors(order, diagonal + added, added[order], rows)

    @abstractmethod
    def upper(self, panel: slice) -> Floats:
        """U's square [C, C] of a panel of columns, whose `start` is a multiple of `PANEL`."""

    @abstractmethod
    def columns(self, weight: Floats) -> Columns:
        """The way through `weight` [K, n], a piece of a matrix with its features in `order`."""


@dataclass(frozen=True)
class WholeFactor(InputFactor):
    """U as a whole: the errors of a panel change all columns after it."""

    added: Doubles  # [K], in `order`
    factor: Floats  # U [K, K]

    def upper(self, panel: slice) -> Floats:
        """See the base."""
        return self.factor[panel, panel]

    def columns(self, weight: Floats) -> Columns:
        """See the base."""
        return _PassedOn(self, weight)


class _PassedOn:
    """With weight - rounded = errors U and U D Uᵀ = 1, the errors' squares sum to what the outputs lose under D."""

    def __init__(self, inputs: WholeFactor, weight: Floats) -> None:
        self.inputs, self.weight, self.rest, self.sum = inputs, weight, weight.copy(), 0.0

    def reach(self, panel: slice) -> Floats:
        return self.rest[panel]

    def leave(self, panel: slice, rounded: Floats, errors: Floats) -> None:
        self.rest[panel.stop :] -= self.inputs.factor[panel, panel.stop :].T @ errors
        lost = np.subtract(self.weight[panel], rounded, out=rounded)
        self.sum += float(np.sum(_squares(errors)) - self.inputs.added[panel] @ _squares(lost))

    def error(self) -> float:
        return self.sum


@dataclass(frozen=True)
class PanelFactors(InputFactor):
    """Of few tokens X [t, K], D = XᵀX + A: what a panel's errors change in later columns goes by way of the tokens.

    Where the columns before a panel P are rounded, and R is P with all columns after it, the weights of R that lose
    least are w + A⁻¹ Xᵣᵀ G⁻¹ e, with e [t] what the tokens' outputs have lost so far and G = 1 + Xᵣ A⁻¹ Xᵣᵀ [t, t]: the
    minimum of |e - Xᵣ d|² + dᵀA d over changes d. GPTQ's recurrence arrives at the same.
    """

    inputs: Floats  # Xᵀ [K, t]
    onto: Floats  # of each panel A⁻¹ Xₚᵀ G⁻¹, together [K, t]
    uppers: tuple[Floats, ...]  # of each panel U's square

    def upper(self, panel: slice) -> Floats:
        """See the base."""
        return self.uppers[panel.start // PANEL]

    def columns(self, weight: Floats) -> Columns:
        """See the base."""
        return _ThroughTokens(self, weight)


class _ThroughTokens:
    def __init__(self, inputs: PanelFactors, weight: Floats) -> None:
        self.inputs, self.weight = inputs, weight
        self.lost = np.zeros((inputs.inputs.shape[1], weight.shape[1]), np.float32)  # of the outputs, by token

    def reach(self, panel: slice) -> Floats:
        return np.asarray(self.weight[panel] + self.inputs.onto[panel] @ self.lost)

    def leave(self, panel: slice, rounded: Floats, errors: Floats) -> None:
        self.lost += self.inputs.inputs[panel].T @ np.subtract(self.weight[panel], rounded, out=rounded)

    def error(self) -> float:
        return float(np.sum(np.square(self.lost), dtype=np.float64))


def _squares(values: Floats) -> Doubles:
    """Sums of squares [C] of `values` [C, n], which are written over."""
    return np.asarray(np.sum(np.square(values, out=values), axis=1, dtype=np.float64))


def _whole_factor(
    order: NDArray[np.int64], importance: Doubles, added: Doubles, moment: NDArray[np.float64]
) -> WholeFactor:
    turned = order[::-1]
    matrix = moment[np.ix_(turned, turned)]
    matrix[np.diag_indices(len(matrix))] += added[::-1]
    with piecewise() as each:
        return WholeFactor(order, importance, added, inverse_factor(matrix, each))


def _panel_factors(order: NDArray[np.int64], importance: Doubles, added: Doubles, rows: Floats) -> PanelFactors:
    inputs = np.ascontiguousarray(rows.T[order])
    onto, uppers = np.empty_like(inputs), list[Floats]()
    inverse, size = np.eye(len(rows)), 1 / np.sqrt(added)
    with piecewise() as each:
        for start in reversed(range(0, len(inputs), PANEL)):
            panel = slice(start, start + PANEL)
            scale = size[panel, None]  # of inputs so divided A is 1
            after, square = _add_panel(inputs[panel] * scale, inverse, each)
            onto[panel] = after * scale
            # of the inverse of D over R, the part that P sees of itself
            uppers.append(inverse_factor(square[::-1, ::-1], each) * scale.T.astype(np.float32))
    return PanelFactors(order, importance, inputs, onto, tuple(reversed(uppers)))


def _add_panel(panel: Doubles, inverse: Doubles, each: Each) -> tuple[Doubles, Doubles]:
    """Add `panel` Xₚᵀ [C, t] to G, of which `inverse` is held, by Woodbury's identity: G + Xₚ Xₚᵀ is held then.

    Gives Xₚᵀ G⁻¹ after it [C, t], and 1 + Xₚᵀ G⁻¹ Xₚ before it [C, C].
    """
    before, after = np.empty((2, *panel.shape))

    def reach(tokens: slice) -> None:
        np.matmul(panel, inverse[:, tokens], out=before[:, tokens])

    each(reach, len(inverse), SMALL)
    square = before @ panel.T
    square[np.diag_indices(len(square))] += 1
    solved = np.linalg.inv(square)

    def add(tokens: slice) -> None:
        np.matmul(solved, before[:, tokens], out=after[:, tokens])
        inverse[:, tokens] -= before.T @ after[:, tokens]

    each(add, len(inverse), SMALL)
    return after, square
