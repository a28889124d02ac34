"""The experts of a session that may not take all of them into memory: opens the library's cache, and says how it does.

The cache itself is `expert_cache.cc` within the library; what is read, when, and what makes room is decided there.
"""

from __future__ import annotations

import mmap
import os
import re
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arriero.errors import ArrieroError, MachineLacks
from arriero.runtimes.backend import CacheStatistics, LayerReads
from arriero.runtimes.weight_files import inside

READERS = 8  # threads, and so reads that a drive has to do at once
COUNTERS = 7  # of a layer, in the order of `LayerReads`, and the number of an error
PAGE = 4096


class ExpertCache:
    """The caches of all layers with experts."""

    def __init__(
        self,
        bundle: Path,
        library: Any,
        entries: Sequence[Mapping[str, Any]],
        tables: Sequence[np.ndarray],
        slots: Sequence[int],
    ) -> None:
        """Let `library` keep `slots` experts of each layer.

        `entries` are the layers' experts in its signature, `tables` the memory through which it finds their caches.
        """
        self._entries, self._slots = entries, tuple(slots)
        names = sorted({name for entry in entries for name, _ in entry["records"]})
        opened = {name: open_direct(inside(bundle, name)) for name in names}
        self.buffered = next((reason for _, reason in opened.values() if reason is not None), None)
        description = [len(entries), READERS, self.buffered is None]
        for entry, table, count in zip(entries, tables, slots, strict=True):
            description += [len(entry["records"]), entry["bytes"], count, table.ctypes.data]
            for name, offset in entry["records"]:
                description += [opened[name][0], offset]
        descriptors = [descriptor for descriptor, _ in opened.values()]
        self._count = library.get_function("arriero_count_experts", True)
        described = np.array(description, np.int64)
        self._cache = library.get_function("arriero_open_experts", True)(described.ctypes.data)
        close = library.get_function("arriero_close_experts", True)
        if not self._cache:
            _close_files(descriptors)
            raise MachineLacks("there is no memory, or no thread, for the cache of experts")
        # Its threads run code of the library, so they end before it goes, whoever drops the session; as a process ends
        # they may be left alone.
        self._using = threading.Lock()
        self.close = weakref.finalize(self, _close, close, self._cache, descriptors, self._using)
        self.close.atexit = False

    def statistics(self) -> CacheStatistics:
        """What was found in memory and what was read, since the cache was opened; nothing once it is closed."""
        numbers = [int(re.findall(r"layers\.(\d+)", entry["name"])[0]) for entry in self._entries]
        with self._using:
            counts = self._counts().tolist() if self.close.alive else []
        reads = tuple(
            LayerReads(number, len(entry["records"]), slots, hits, misses, nbytes, read / 1e9, waits, waited / 1e9)
            for number, entry, slots, (hits, misses, nbytes, read, waits, waited, _) in zip(
                numbers, self._entries, self._slots, counts, strict=bool(counts)
            )
        )
        return CacheStatistics(reads, self.buffered)

    def check_reads(self) -> None:
        """Refuse to go on after a record that could not be read. Raises `ArrieroError`."""
        for entry, (*_, error) in zip(self._entries, self._counts().tolist(), strict=True):
            if error:
                raise ArrieroError(
                    f"an expert of {entry['name']} cannot be read ({os.strerror(error)})",
                    where=", ".join(sorted({name for name, _ in entry["records"]})),
                    remedy="Check the drive and the bundle: `arriero inspect` hashes every file",
                )

    def _counts(self) -> np.ndarray:
        counts = np.zeros((len(self._entries), COUNTERS), np.int64)
        self._count(self._cache, counts.ctypes.data)
        return counts


def open_direct(path: Path) -> tuple[int, str | None]:
    """Open a file to be read past the system's cache; else through it, and why."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            os.preadv(descriptor, [mmap.mmap(-1, PAGE)], 0)
        except OSError:
            os.close(descriptor)
            raise
    except OSError as error:
        return os.open(path, os.O_RDONLY), f"the file system of {path} has no direct reads ({error.strerror})"
    return descriptor, None


def _close(close: Any, cache: int, descriptors: Sequence[int], using: threading.Lock) -> None:
    with using:  # another thread may be counting
        close(cache)
    _close_files(descriptors)


def _close_files(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
