"""Small seeded sketches of large arrays: the error between two arrays follows from the difference of their sketches.

A count sketch: every coordinate gets a random sign and one of `BUCKETS` sums. It is linear, and the squared norm of the
sketch of d estimates |d|^2 without bias, with variance at most 2 / BUCKETS * |d|^4: one standard error is 8.8 % of the
square and 4.4 % of the norm. Signs and buckets are drawn again from the seed wherever a sketch is made; nothing else of
the projection is stored. The draws are raw outputs of PCG64, which numpy keeps the same in every version.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arriero.runtimes.proof.metrics import ErrorSums, ShapesDiffer

BUCKETS = 256
PER_DRAW = 4  # coordinates of one 64-bit draw: 8 bits of bucket and one of sign each
PIECE = 1 << 20  # coordinates at once; a multiple of PER_DRAW


def stream(seed: int, label: str) -> np.random.PCG64:
    """The bit generator of everything that is drawn under `label`."""
    return np.random.PCG64([seed, zlib.crc32(label.encode())])


def sketch(array: NDArray, seed: int, label: str) -> NDArray[np.float64]:
    """The sketch [BUCKETS] of an array of any shape; equal arrays give equal bits on every machine."""
    bits, sums = stream(seed, label), np.zeros(BUCKETS)
    for piece in _pieces(array):
        raw = bits.random_raw(-(-len(piece) // PER_DRAW))
        draw = np.asarray(raw, "<u8").view("<u2")[: len(piece)]
        sums += np.bincount(draw & 255, np.where(draw & 256, -piece, piece), BUCKETS)
    return sums


def _pieces(array: NDArray) -> Iterator[NDArray[np.float64]]:
    """The coordinates of an array in order, `PIECE` at a time: as float64 all of them may not fit memory."""
    flat = array.reshape(-1)
    for start in range(0, flat.size, PIECE):
        yield flat[start : start + PIECE].astype(np.float64)


def seeded_features(seed: int, label: str, rows: int, columns: int) -> NDArray[np.float32]:
    """Numbers f32 [rows, columns], uniform in [-1, 1), that are the same on every machine."""
    raw = np.asarray(stream(seed, label).random_raw(rows * columns), np.uint64)
    return ((raw >> np.uint64(40)).astype(np.float32) / np.float32(1 << 23) - 1).reshape(rows, columns)


@dataclass(frozen=True)
class SketchedArray:
    """What a record keeps of an array: shape, sketch and exact squared norm."""

    shape: Sequence[int]
    sums: NDArray[np.float64]
    squared_norm: float
    seed: int
    label: str

    @classmethod
    def of(cls, array: NDArray, seed: int, label: str) -> SketchedArray:
        """Sketch an array."""
        squared_norm = sum((float(piece @ piece) for piece in _pieces(array)), 0.0)
        return cls(array.shape, sketch(array, seed, label), squared_norm, seed, label)

    def errors(self, candidate: NDArray) -> ErrorSums:
        """The estimated error of the candidate's array, with its variance. Raises ShapesDiffer."""
        if tuple(candidate.shape) != tuple(self.shape):
            raise ShapesDiffer(f"shapes differ: reference {list(self.shape)}, candidate {list(candidate.shape)}")
        difference = sketch(candidate, self.seed, self.label) - self.sums
        with np.errstate(invalid="ignore", over="ignore"):
            noise = float(difference @ difference)
        return ErrorSums(self.squared_norm, noise, None, math.prod(self.shape), 2.0 / BUCKETS * noise**2)


@dataclass(frozen=True)
class WholeArray:
    """An array that is known whole, so that every error is exact."""

    values: NDArray

    def errors(self, candidate: NDArray) -> ErrorSums:
        """The error of the candidate's array. Raises ShapesDiffer."""
        return ErrorSums.of(self.values, candidate)
