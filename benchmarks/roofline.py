"""The probes of what the machine can do at most, built from `roofline.cc` for this very machine."""

from __future__ import annotations

import ctypes
import platform
import subprocess
from pathlib import Path

import numpy as np

from arriero.export.compile.build_kernels import find_compiler


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
