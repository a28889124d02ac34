"""Compiles the CUDA kernels' sources for the CPU, over `cuda_emulated/`, and runs them block by block."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from arriero.export.compile.cuda.launch import KERNELS, SCALARS, Kernel, source_of
from tests.shared import locked

HEADERS = Path(__file__).with_name("cuda_emulated")
SOURCES = Path(__file__).parents[1] / "export" / "compile" / "cuda"
FLAGS = ["-x", "c++", "-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]


EVERY = source_of(KERNELS)
Order = Callable[[int], np.ndarray]


def forward(threads: int) -> np.ndarray:
    """The order in which they are numbered."""
    return np.arange(threads)


def backward(threads: int) -> np.ndarray:
    """The last one first."""
    return forward(threads)[::-1]


def shuffled(threads: int) -> np.ndarray:
    """Any order, the same in every run."""
    return np.random.default_rng(0).permutation(threads)


def build(out: Path, headers: Sequence[Path] = (HEADERS, SOURCES), source: str = EVERY) -> None:
    """Compile `source`, by default all kernels, into the shared library `out`."""
    include = [f"-I{folder}" for folder in headers]
    done = subprocess.run(["g++", *FLAGS, *include, "-", "-o", str(out)], input=source, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def cached_library(config: pytest.Config) -> Path:
    """All kernels over the emulation, compiled once per version of the sources."""
    files = sorted([*HEADERS.iterdir(), *SOURCES.glob("*.h"), *SOURCES.glob("*.cu")])
    parts = [*(file.read_bytes() for file in files), *map(str.encode, [*FLAGS, EVERY])]
    key = hashlib.sha256(b"".join(parts)).hexdigest()[:16]
    path = config.cache.mkdir("cuda") / f"emulated-{key}.so"
    with locked(path):
        if not path.is_file():
            build(path)
    return path


def build_altered(folder: Path, kernel: Kernel, changes: Mapping[str, tuple[str, str]]) -> Path:
    """`kernel` alone, of sources or an emulation with `changes`: file -> what is there, and what instead."""
    own = [source for source in [*SOURCES.glob("*.h"), *SOURCES.glob("*.cu")] if source.name != "ptx.h"]
    folder.mkdir(exist_ok=True)
    for source in [*own, *HEADERS.iterdir()]:
        text = source.read_text()
        if source.name in changes:
            right, wrong = changes[source.name]
            assert right in text
            text = text.replace(right, wrong)
        (folder / source.name).write_text(text)
    build(folder / "altered.so", (folder,), source_of([kernel]))
    return folder / "altered.so"


class Broken(AssertionError):
    """A kernel broke a rule of the machine."""


class EmulatedGpu:
    """One launch at a time. `order` gives the threads' order by their number, `late` when asynchronous copies arrive,
    `restless` whether threads also give way between barriers."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.emulate.restype = ctypes.c_char_p

    def launch(
        self,
        kernel: Kernel,
        arrays: Sequence[np.ndarray],
        sizes: dict[str, int],
        result: np.ndarray,
        *,
        touch: Sequence[np.ndarray] | None = None,
        order: Order = forward,
        late: bool = True,
        restless: bool = False,
        grid: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """Run `kernel` into `result` (16-bit) and give what it rounded, float32. It may read `touch` only, by default
        `arrays`; NaN where it wrote nothing."""
        assert len(arrays) == len(kernel.arrays)
        assert all(array.flags.c_contiguous and array.ctypes.data % 16 == 0 for array in arrays)
        ranges = [[a.ctypes.data, a.ctypes.data + a.nbytes, 0] for a in (arrays if touch is None else touch)]
        exact = np.full(result.shape, np.nan, np.float32)
        x, y = grid or kernel.grid(*(sizes[name] for name in SCALARS[:-1]))
        failure = self.library.emulate(
            ctypes.cast(self.library[kernel.name], ctypes.c_void_p),
            len(arrays),
            (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays)),
            (ctypes.c_int * 6)(*(sizes[name] for name in SCALARS)),
            ctypes.c_void_p(result.ctypes.data),
            ctypes.c_void_p(exact.ctypes.data),
            result.size,
            x,
            y,
            (ctypes.c_int * kernel.threads)(*order(kernel.threads).tolist()),
            kernel.threads,
            int(late),
            int(restless),
            (ctypes.c_uint64 * (3 * len(ranges)))(*(int(value) for row in ranges for value in row)),
            len(ranges),
        )
        if failure:
            raise Broken(failure.decode())
        return exact
