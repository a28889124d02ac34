"""What GPTQ needs of a matrix's inputs: the triangular factor of their inverse second moments.

Matrices that read the same inputs share one.
Legend: K input features, H [K, K] = sum over inputs of x xᵀ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arriero.profiles.piecewise import Each, piecewise

SMALL = 256  # triangular matrices up to here are factored, inverted and multiplied as they are


@dataclass(frozen=True)
class InputFactor:
    """`upper` f32 [K, K]: the upper triangular U with UᵀU = (H + `added` on its diagonal)⁻¹, features in `order`."""

    order: NDArray[np.int64]  # [K], falling by the moment ("act-order")
    importance: NDArray[np.float64]  # [K], the damped diagonal, features in their own order
    added: float
    upper: NDArray[np.float32]

    @classmethod
    def of(cls, moment: NDArray[np.float64], damping: float) -> InputFactor:
        """Factor the second moments H; `damping` is the share of their mean diagonal that is added to the diagonal."""
        diagonal = np.diagonal(moment)
        mean = float(np.mean(diagonal))
        # never active features count as barely active; without any input all are alike
        added = damping * mean if mean > 0 else 1.0
        order = np.argsort(-diagonal, kind="stable")
        return cls(order, diagonal + added, added, _inverse_factor(moment, order, added))


def _inverse_factor(moment: NDArray[np.float64], order: NDArray[np.int64], added: float) -> NDArray[np.float32]:
    """The upper triangular U [K, K] with UᵀU the inverse of `moment` + `added` on its diagonal, features in `order`.

    The Cholesky factor L of that matrix turned about both axes, inverted and turned back, is one: neither the inverse
    of the matrix nor L as a whole is ever made. In float64 but for what is given.
    """
    turned = order[::-1]
    matrix = moment[np.ix_(turned, turned)]
    matrix[np.diag_indices(len(matrix))] += added
    with piecewise() as each:
        return np.ascontiguousarray(_inverse_cholesky(matrix, each)[::-1, ::-1], np.float32)


def _inverse_cholesky(matrix: NDArray[np.float64], each: Each) -> NDArray[np.float64]:
    """The inverse of the Cholesky factor of `matrix`, by halves, so that nearly all of it is products of matrices.

    Only the lower triangle is read, and its second half written over.
    """
    size = len(matrix)
    if size <= SMALL:
        return np.tril(np.linalg.inv(np.linalg.cholesky(matrix)))
    half = size // 2
    inverse = np.zeros((size, size))
    first = inverse[:half, :half] = _inverse_cholesky(matrix[:half, :half], each)
    below = _times_lower(matrix[half:, :half], first, each, transposed=True)  # the factor's own
    rest = matrix[half:, half:]

    def subtract(columns: slice) -> None:
        rest[columns.start :, columns] -= below[columns.start :] @ below[columns].T

    each(subtract, len(rest), SMALL)
    last = inverse[half:, half:] = _inverse_cholesky(rest, each)
    inverse[half:, :half] = -_times_lower(_times_lower(below, first, each).T, last, each, transposed=True).T
    return inverse


def _times_lower(
    matrix: NDArray[np.float64], lower: NDArray[np.float64], each: Each, transposed: bool = False
) -> NDArray[np.float64]:
    """`matrix` [n, K] times the lower triangular `lower` [K, K] or its transpose, without most of its zeros."""
    product = np.empty(matrix.shape)

    def multiply(columns: slice) -> None:
        if transposed:
            np.matmul(matrix[:, : columns.stop], lower[columns, : columns.stop].T, out=product[:, columns])
        else:
            np.matmul(matrix[:, columns.start :], lower[columns.start :, columns], out=product[:, columns])

    each(multiply, len(lower), SMALL)
    return product
