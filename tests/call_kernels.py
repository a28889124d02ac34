"""Calls the C++ kernels from numpy, as tests and measurements need them; a bundle's compiled graph calls them itself.

Legend: as in `kernels/arriero_kernels.h`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMATS = {"f32": 0, "bf16": 1, "f16": 2, "e4m3": 3, "int8": 4, "int4": 5}
ALIGNMENT = 64
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Weight:
    """One stored matrix or stack of matrices; `format` is a key of FORMATS."""

    format: str
    data: NDArray[Any]
    scales: Floats | None = None
    block: int = 0


class Kernels:
    """The kernels in a shared library; every step runs as `parts` calls, on as many threads."""

    def __init__(self, library: Path, parts: int = 1) -> None:
        """Load `library`, made by `link_shared`."""
        self._library = ctypes.CDLL(str(library))
        self._library.arriero_level.restype = ctypes.c_char_p
        for name in ("linear", "dispatch", "attention"):
            self._library[f"arriero_{name}_workspace"].restype = ctypes.c_int64
        self.parts = parts
        self._pool = ThreadPoolExecutor(parts) if parts > 1 else None
        self._space: NDArray[np.uint8] = np.empty(0, np.uint8)

    def level(self) -> str:
        """The instruction set in use."""
        name: bytes = self._library.arriero_level()
        return name.decode()

    def use_level(self, name: str) -> bool:
        """Switch to the instruction set `name`; False if this CPU lacks it."""
        return bool(self._library.arriero_use_level(name.encode()) == 0)

    def linear(self, x: Floats, weight: Weight, outputs: int) -> Floats:
        """x [T, K] -> y [T, outputs]."""
        tokens, features = x.shape
        form = (FORMATS[weight.format], weight.block)
        space = self._workspace("linear", *form, tokens, outputs, features)
        y = np.empty((tokens, outputs), np.float32)
        if weight.scales is not None:
            self._run("linear_prepare", *form, x, tokens, features, space)
        self._run("linear", *form, x, weight.data, weight.scales, y, tokens, outputs, features, space)
        return y

    def dispatch(self, x: Floats, expert_id: Ints, score: Floats, gate_up: Weight, down: Weight, width: int) -> Floats:
        """x [T, H], expert_id and score [T, R], experts of `width` F -> y [T, H]."""
        tokens, hidden = x.shape
        form = (FORMATS[gate_up.format], gate_up.block, FORMATS[down.format], down.block)
        sizes = (tokens, expert_id.shape[1], len(gate_up.data), hidden, width)
        space = self._workspace("dispatch", *form, *sizes)
        y = np.empty((tokens, hidden), np.float32)
        self._run("dispatch_prepare", *form, x, expert_id, score, *sizes, space)
        self._run("dispatch_gate_up", *form, gate_up.data, gate_up.scales, *sizes, space)
        self._run("dispatch_down", *form, down.data, down.scales, y, *sizes, space)
        return y

    def attention(
        self,
        q: Floats,
        k: Floats,
        v: Floats,
        positions: Ints,
        key_cache: Floats,
        value_cache: Floats,
        chunk: int,
    ) -> Floats:
        """q [B, S, Q*D], k and v [B, S, G*D], positions [B, S] -> out [B, S, Q*D]; writes the caches [B, G, C, D]."""
        batch, steps, _ = q.shape
        _, groups, slots, size = key_cache.shape
        heads = q.shape[2] // size
        space = self._workspace("attention", batch, steps, heads, groups, size)
        out = np.empty_like(q)
        sizes = (groups, slots, size, chunk)
        self._run("cache_write", k, v, positions, key_cache, value_cache, batch, steps, *sizes)
        self._run("attention", q, positions, key_cache, value_cache, out, batch, steps, heads, *sizes, space)
        return out

    def _workspace(self, name: str, *sizes: int) -> NDArray[np.uint8]:
        size = self._library[f"arriero_{name}_workspace"](*map(ctypes.c_int64, (*sizes, self.parts)))
        if len(self._space) < size + ALIGNMENT:
            self._space = np.empty(size + ALIGNMENT, np.uint8)
        start = -self._space.ctypes.data % ALIGNMENT
        return self._space[start : start + size]

    def _run(self, name: str, *arguments: NDArray[Any] | int | None) -> None:
        function: Callable[..., int] = self._library[f"arriero_{name}"]
        values = [_argument(argument) for argument in arguments]

        def run(part: int) -> None:
            function(*values, ctypes.c_int64(part), ctypes.c_int64(self.parts))

        if self._pool is None:
            run(0)
        else:
            list(self._pool.map(run, range(self.parts)))


def _argument(value: NDArray[Any] | int | None) -> ctypes.c_void_p | ctypes.c_int64:
    if value is None:
        return ctypes.c_void_p()
    if isinstance(value, int):
        return ctypes.c_int64(value)
    if not value.flags.c_contiguous:
        raise ValueError("kernels take contiguous arrays")
    return ctypes.c_void_p(value.ctypes.data)
