"""The probes of what the machine can do at most, built from `roofline.cc` for this very machine."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arriero.export.compile.build_kernels import find_compiler

LINE = 8  # words of a cache line
READ = 1 << 30  # bytes of the buffer whose reading is the roofline, beyond any cache
TRIES = 4  # the first after something else has been seen at a fifth to two thirds of the next ones
DOTS = 10_000_000  # rounds of the loop of dots, a tenth of a second or more


def build_probe(folder: Path) -> ctypes.CDLL:
    """Compile the probes into `folder` and load them. Raises MachineLacks without a compiler."""
    probe = folder / "roofline.so"
    source = Path(__file__).with_suffix(".cc")
    flags = ["-O3", "-march=native", "-fPIC", "-shared"]
    subprocess.run([find_compiler(platform.machine()), *flags, str(source), "-o", str(probe)], check=True)
    library = ctypes.CDLL(str(probe))
    library.read_sum.restype = ctypes.c_uint64
    library.int8_dots.restype = library.float_multiply_adds.restype = ctypes.c_int64
    return library


def read_sum(probe: ctypes.CDLL, words: np.ndarray) -> int:
    """Give the sum, modulo 2**64, of `words` u64 [n] wherever they lie, read by the calling thread.

    Other Python threads run meanwhile.
    """
    return int(probe.read_sum(ctypes.c_void_p(words.ctypes.data), ctypes.c_int64(words.nbytes)))


def make_buffer() -> np.ndarray:
    """The buffer u64 [n] whose reading is the roofline, aligned to a cache line as numpy's own is not."""
    room = np.ones(READ // 8 + LINE, np.uint64)
    return room[-room.ctypes.data % 64 // 8 :][: READ // 8]


def read_bandwidth(probe: ctypes.CDLL, buffer: np.ndarray, threads: int) -> float:
    """Bytes per second with which `threads` read `buffer` u64 [n], n a multiple of `LINE`: the best of `TRIES`."""
    # in whole rows of 64 bytes, so that no part begins within one
    parts = [part.reshape(-1) for part in np.array_split(buffer.reshape(-1, LINE), threads)]
    return buffer.nbytes / _least_seconds(lambda part: read_sum(probe, part), parts)


def dot_rate(probe: ctypes.CDLL, threads: int) -> float:
    """Operations per second of `threads` that do nothing but dots of int8, two a product: the best of `TRIES`."""
    done: list[int] = []
    seconds = _least_seconds(lambda rounds: done.append(probe.int8_dots(ctypes.c_int64(rounds))), [DOTS] * threads)
    return threads * done[0] / seconds


def _least_seconds(work: Callable[[Any], object], parts: Sequence[Any]) -> float:
    """The least time, of `TRIES`, of `work` on every part, each on a thread of its own."""

    def seconds() -> float:
        workers = [threading.Thread(target=work, args=(part,)) for part in parts]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return time.perf_counter() - start

    return min(seconds() for _ in range(TRIES))
