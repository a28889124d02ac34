"""Triangular matrices in float64, by halves, so that nearly all of the work is products of matrices."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from arriero.profiles.piecewise import Each

SMALL = 256  # triangular matrices up to here are factored, inverted and multiplied as they are


def inverse_factor(turned: NDArray[np.float64], each: Each) -> NDArray[np.float32]:
    """The upper triangular U [K, K] with UᵀU the inverse of a matrix, which comes `turned`: its last row and column
    first. What was given is written over.

    The Cholesky factor of that, inverted and turned back, is one: neither the inverse of the matrix nor the factor as a
    whole is ever made.
    """
    return np.ascontiguousarray(_inverse_cholesky(turned, each)[::-1, ::-1], np.float32)


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
