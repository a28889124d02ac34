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


class Sketcher:
    """A sketch [BUCKETS] in the making: the coordinates of an array come in order, in as many pieces as one likes."""

    def __init__(self, seed: int, label: str) -> None:
        self.sums, self._bits, self._drawn = np.zeros(BUCKETS), stream(seed, label), np.zeros(0, "<u2")

    def add(self, array: NDArray) -> None:
        """Go on with the coordinates of `array`."""
        for piece in _pieces(array):
            draw = self._draw(len(piece))
            self.sums += np.bincount(draw & 255, np.where(draw & 256, -piece, piece), BUCKETS)

    def _draw(self, count: int) -> NDArray[np.uint16]:
        """The next `count` draws; what a 64-bit one has beyond them is kept for the next piece."""
        raw = self._bits.random_raw(-(-max(0, count - len(self._drawn)) // PER_DRAW))
        drawn = np.concatenate([self._drawn, np.asarray(raw, "<u8").view("<u2")])
        self._drawn = drawn[count:]
        return drawn[:count]


def sketch(array: NDArray, seed: int, label: str) -> NDArray[np.float64]:
    """The sketch [BUCKETS] of an array of any shape; equal arrays give equal bits on every machine."""
    whole = Sketcher(seed, label)
    whole.add(array)
    return whole.sums


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

    def meter(self) -> SketchMeter:
        """Measures a candidate's array that comes in pieces."""
        return SketchMeter(self)

    def errors(self, candidate: NDArray) -> ErrorSums:
        """The estimated error of the candidate's array, with its variance. Raises ShapesDiffer."""
        return _errors(self.shape, candidate, self.meter())


class SketchMeter:
    """The estimated error of an array that comes in pieces, in order."""

    def __init__(self, reference: SketchedArray) -> None:
        self._reference, self._count = reference, 0
        self._sketcher = Sketcher(reference.seed, reference.label)

    def add(self, piece: NDArray) -> None:
        """Go on with `piece`."""
        self._sketcher.add(piece)
        self._count += piece.size

    def errors(self) -> ErrorSums:
        """The error of all pieces together, with its variance. Raises ShapesDiffer where they are more or less."""
        _check_size(self._reference.shape, self._count)
        difference = self._sketcher.sums - self._reference.sums
        with np.errstate(invalid="ignore", over="ignore"):
            noise = float(difference @ difference)
        return ErrorSums(self._reference.squared_norm, noise, None, self._count, 2.0 / BUCKETS * noise**2)


@dataclass(frozen=True)
class WholeArray:
    """An array that is known whole, so that every error is exact."""

    values: NDArray

    def meter(self) -> WholeMeter:
        """Measures a candidate's array that comes in pieces."""
        return WholeMeter(self.values)

    def errors(self, candidate: NDArray) -> ErrorSums:
        """The error of the candidate's array. Raises ShapesDiffer."""
        return _errors(self.values.shape, candidate, self.meter())


class WholeMeter:
    """The error of an array that comes in pieces, in order."""

    def __init__(self, reference: NDArray) -> None:
        self._reference, self._sums = reference, ErrorSums()

    def add(self, piece: NDArray) -> None:
        """Go on with `piece`. Raises ShapesDiffer for more than there is."""
        flat, start = piece.reshape(-1), self._sums.count
        self._sums += ErrorSums.of(self._reference.reshape(-1)[start : start + flat.size], flat)

    def errors(self) -> ErrorSums:
        """The error of all pieces together. Raises ShapesDiffer where they are less."""
        _check_size(self._reference.shape, self._sums.count)
        return self._sums


def _errors(shape: Sequence[int], candidate: NDArray, meter: SketchMeter | WholeMeter) -> ErrorSums:
    if tuple(candidate.shape) != tuple(shape):
        raise ShapesDiffer(f"shapes differ: reference {list(shape)}, candidate {list(candidate.shape)}")
    meter.add(candidate)
    return meter.errors()


def _check_size(shape: Sequence[int], count: int) -> None:
    if count != math.prod(shape):
        raise ShapesDiffer(f"shapes differ: reference {list(shape)}, candidate of {count} numbers")
