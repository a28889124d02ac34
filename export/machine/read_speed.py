"""How fast this machine reads weights: from memory by all cores, and from a drive past the system's cache."""

from __future__ import annotations

import mmap
import os
import random
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from arriero.runtimes.cpu import usable_cores
from arriero.runtimes.expert_cache import READERS, open_direct

MEMORY_BYTES = 256 << 20  # of each core: beyond what caches hold
FILE_BYTES = 256 << 20
PIECE = 1 << 20  # bytes of one read, as the cache of experts has it
SECONDS, TIMES = 0.5, 3


@dataclass(frozen=True)
class ReadSpeed:
    """Bytes per second from memory and from the drive; `buffered` says why the latter go through the system's cache."""

    memory: float
    drive: float
    buffered: str | None


def measure_read_speed(folder: Path) -> ReadSpeed:
    """Measure this machine as it is now, with a scratch file on the drive that `folder` is, or will be, on."""
    place = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    with tempfile.NamedTemporaryFile(dir=place, prefix=".arriero-speed-") as scratch:
        block = os.urandom(PIECE)
        for _ in range(FILE_BYTES // PIECE):
            scratch.write(block)
        scratch.flush()
        os.fsync(scratch.fileno())
        drive, buffered = drive_speed(Path(scratch.name))
    return ReadSpeed(memory_speed(), drive, buffered)


def drive_speed(file: Path) -> tuple[float, str | None]:
    """Bytes per second of `READERS` threads that read pieces of `file` all over it, the best of three times; why not
    directly, if so.
    """
    descriptor, buffered = open_direct(file)
    pieces = file.stat().st_size // PIECE

    def read(number: int) -> int:
        draw, buffer, done = random.Random(number), mmap.mmap(-1, PIECE), 0
        while time.perf_counter() < end:
            done += os.preadv(descriptor, [buffer], draw.randrange(pieces) * PIECE)
        return done

    best = 0.0
    try:
        for _ in range(TIMES):
            start = time.perf_counter()
            end = start + SECONDS
            best = max(best, _together(read, READERS) / (time.perf_counter() - start))
        return best, buffered
    finally:
        os.close(descriptor)


def memory_speed() -> float:
    """Bytes per second that all cores read from memory together, the best of three times."""
    cores = usable_cores()
    blocks = [np.ones(MEMORY_BYTES // 8, np.int64) for _ in range(cores)]
    best = 0.0
    for _ in range(TIMES):
        start = time.perf_counter()
        _together(lambda core: int(blocks[core].sum()), cores)
        best = max(best, cores * MEMORY_BYTES / (time.perf_counter() - start))
    return best


def _together(run: Callable[[int], int], threads: int) -> int:
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(run, range(threads)))
