"""Weights where they lie in a bundle's files: mapped, or read into memory of their own.

An entry is what a library's signature says of a weight: file, offset, dtype, shape, and whether it must be aligned.
Legend: E experts.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from arriero.errors import ArrieroError
from arriero.runtimes.inside import climbs_out
from arriero.runtimes.lazy_memory import NO_RESERVE

ALIGNMENT = 64
DTYPES = {"FLOAT": np.float32, "BFLOAT16": np.uint16, "FLOAT16": np.float16, "UINT8": np.uint8}
Entry = Mapping[str, Any]


class WeightFiles(Protocol):
    """Where a library's weights come from."""

    def weight(self, entry: Entry) -> np.ndarray:
        """The weight of `entry`."""
        ...

    def table(self, entry: Entry) -> np.ndarray:
        """The table i64 [1 + E] of a layer's experts: no cache, and where each record lies."""
        ...


class MappedWeights:
    """Files that are mapped, each once: what no step touches is never read from disk."""

    def __init__(self, bundle: Path) -> None:
        """Map files of `bundle` as they are asked for."""
        self.bundle = bundle
        self._files: dict[str, np.ndarray] = {}

    def weight(self, entry: Entry) -> np.ndarray:
        """The weight of `entry` where it lies in its file."""
        file, start = self._map(entry["file"]), entry["offset"]
        array: np.ndarray = file[start : start + entry_bytes(entry)].view(DTYPES[entry["dtype"]])
        return aligned(array.reshape(entry["shape"])) if entry["aligned"] else array.reshape(entry["shape"])

    def table(self, entry: Entry) -> np.ndarray:
        """The table of a layer's experts, which holds for as long as this does."""
        addresses = [self._map(name).ctypes.data + offset for name, offset in entry["records"]]
        return aligned(np.array([0, *addresses], np.int64))

    def _map(self, name: str) -> np.ndarray:
        """A file, mapped copy-on-write because DLPack wants it writable.

        Nothing ever writes there, so no memory is set aside for copies: a file may be larger than the memory.
        """
        if name not in self._files:
            with inside(self.bundle, name).open("rb") as opened:
                flags, writable = mmap.MAP_PRIVATE | NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
                mapped = mmap.mmap(opened.fileno(), 0, flags=flags, prot=writable)
            self._files[name] = np.frombuffer(mapped, np.uint8)
        return self._files[name]


class ReadWeights:
    """Weights that are read into memory, each once, and tables of experts that a cache is to fill."""

    def __init__(self, bundle: Path) -> None:
        """Read weights of `bundle` as they are asked for."""
        self.bundle = bundle
        self._read: dict[tuple[str, int], np.ndarray] = {}

    def weight(self, entry: Entry) -> np.ndarray:
        """A copy of the weight of `entry`."""
        place = entry["file"], entry["offset"]
        if place not in self._read:
            self._read[place] = read_array(inside(self.bundle, place[0]), place[1], entry_bytes(entry))
        array: np.ndarray = self._read[place].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
        return array

    def table(self, entry: Entry) -> np.ndarray:
        """A table of zeros."""
        return aligned(np.zeros(1 + len(entry["records"]), np.int64))


def read_array(path: Path, offset: int, count: int) -> np.ndarray:
    """Bytes of a file in memory of their own, aligned; the system is asked to keep no copy of them."""
    array = aligned(np.empty(count, np.uint8))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        done = 0
        while done < count:
            read = os.preadv(descriptor, [array[done:].data], offset + done)
            if not read:
                raise ArrieroError("the file ends too early", where=str(path), expected=f"{offset + count} bytes")
            done += read
        os.posix_fadvise(descriptor, offset, count, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return array


def inside(bundle: Path, name: str) -> Path:
    """The file `name` of a bundle. Raises ValueError for one outside."""
    if climbs_out(name):
        raise ValueError(f"its weights are in {name!r}, outside the bundle")
    return bundle / name


def entry_bytes(entry: Entry) -> int:
    """The bytes of a weight."""
    return int(np.prod(entry["shape"], dtype=np.int64)) * np.dtype(DTYPES[entry["dtype"]]).itemsize


def aligned(array: np.ndarray) -> np.ndarray:
    """`array`, or a copy of it, contiguous and at an address that generated code may rely on."""
    array = np.ascontiguousarray(array)
    # numpy gives an empty array strides of zero, which TVM does not take for contiguous
    if array.size and _address(array) % ALIGNMENT == 0:
        return array
    room = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    copy: np.ndarray = np.ndarray(array.shape, array.dtype, room, -_address(room) % ALIGNMENT)
    copy[...] = array
    return copy


def _address(array: np.ndarray) -> int:
    """Where its first number lies; `array.ctypes` takes ten times as long to say it."""
    return int(array.__array_interface__["data"][0])
