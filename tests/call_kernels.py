"""Calls the C++ kernels from numpy, as tests and measurements need them; a bundle's compiled graph calls them itself.

Legend: as in `kernels/arriero_kernels.h`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_NAMES = (
    "f32",
    "bf16",
    "f16",
    "e4m3",
    "int8",
    "int4",
    "",
    "int8_f16",
    "int4_f16",
    "grid4_f16",
    "grid3_f16",
    "grid2_f16",
)
FORMATS = {name: number for number, name in enumerate(_NAMES) if name}
TWICE = 64  # added to an integer format
CACHE_FORMATS = {"float32": 0, "float16": 2, "int8": 6}  # by dtype
ALIGNMENT = 64
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Weight:
    """One stored matrix or stack of matrices; `format` is a key of FORMATS."""

    format: str
    data: NDArray[Any]
    scales: NDArray[np.floating[Any]] | None = None
    block: int = 0


@dataclass(frozen=True)
class Experts:
    """A layer's experts as the kernels read them: a record of each [E, bytes], and where its parts lie in it."""

    gate_up: Weight
    down: Weight
    records: NDArray[np.uint8]
    at: tuple[int, int, int, int]

    @property
    def form(self) -> tuple[int, int, int, int]:
        """Formats and blocks, as the kernels take them."""
        return FORMATS[self.gate_up.format], self.gate_up.block, FORMATS[self.down.format], self.down.block

    @property
    def table(self) -> Ints:
        """Where each record lies."""
        return self.records.ctypes.data + self.records.shape[1] * np.arange(len(self.records), dtype=np.int64)


def pack_experts(gate_up: Weight, down: Weight) -> Experts:
    """Put stacks [E, ..] together, an expert's parts side by side."""
    parts = (gate_up.data, gate_up.scales, down.data, down.scales)
    at, end = [], 0
    for part in parts:
        at.append(end)
        end += 0 if part is None else -(-part[0].nbytes // ALIGNMENT) * ALIGNMENT
    room = np.zeros(len(gate_up.data) * end + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    records = room[start : start + len(gate_up.data) * end].reshape(len(gate_up.data), end)
    for part, offset in zip(parts, at, strict=True):
        if part is not None:
            rows = np.ascontiguousarray(part).reshape(len(part), -1).view(np.uint8)
            records[:, offset : offset + rows.shape[1]] = rows
    return Experts(gate_up, down, records, (at[0], at[1], at[2], at[3]))


class Kernels:
    """The kernels in a shared library; every step runs as `parts` calls, on as many threads."""

    def __init__(self, library: Path, parts: int = 1) -> None:
        """Load `library`, made by `link_shared`."""
        self._library = ctypes.CDLL(str(library))
        self._library.arriero_level.restype = ctypes.c_char_p
        for name in ("linear", "dispatch", "attention", "full_attention"):
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

    def linear(self, x: Floats, weight: Weight, outputs: int, twice: bool = False) -> Floats:
        """x [T, K] -> y [T, outputs]; `twice`: activations are rounded in two steps."""
        tokens, features = x.shape
        form = (FORMATS[weight.format] + TWICE * twice, weight.block)
        space = self._workspace("linear", *form, tokens, outputs, features)
        y = np.empty((tokens, outputs), np.float32)
        if weight.scales is not None:
            self._run("linear_prepare", *form, x, tokens, features, space)
        self._run("linear", *form, x, weight.data, weight.scales, y, tokens, outputs, features, space)
        return y

    def dispatch(
        self,
        x: Floats,
        expert_id: Ints,
        score: Floats,
        experts: Experts,
        width: int,
        waves: Sequence[Sequence[int]] | None = None,
        cuts: Sequence[int] | None = None,
    ) -> Floats:
        """x [T, H], expert_id and score [T, R], experts of `width` F -> y [T, H].

        With `waves` those experts are computed together that one of them names; else all of them. With `cuts` those
        rows are, in the order of their experts, that lie between two of them; else all T * R.
        """
        tokens, hidden = x.shape
        form, sizes = experts.form, (tokens, expert_id.shape[1], len(experts.records), hidden, width)
        space = self._workspace("dispatch", *form, *sizes)
        y = np.empty((tokens, hidden), np.float32)
        self._run("dispatch_prepare", *form, x, expert_id, score, *sizes, space)
        for wave in [range(len(experts.records))] if waves is None else waves:
            table = np.zeros(len(experts.records), np.int64)
            table[list(wave)] = experts.table[list(wave)]
            for first, end in pairwise(cuts or (0, expert_id.size)):
                self._run("dispatch_gate_up", *form, table, first, end, *experts.at[:2], *sizes, space)
                self._run("dispatch_down", *form, table, first, end, *experts.at[2:], y, *sizes, space)
        self._run("dispatch_sum", *form, y, *sizes, space)
        return y

    def attention(
        self,
        q: Floats,
        k: Floats,
        v: Floats,
        positions: Ints,
        key_cache: NDArray[Any],
        value_cache: NDArray[Any],
        chunk: int,
        steps: tuple[Floats, Floats] | tuple[None, None] = (None, None),
        starts: Ints | None = None,
    ) -> Floats:
        """q [B, S, Q*D], k and v [B, S, G*D], positions [B, S] -> out [B, S, Q*D]; writes the caches [B, G, C, D].

        Caches are f32, f16, or i8 with the `steps` [G, D] of keys and of values. With `starts` [B + 1] the first two
        axes of the others are any whose product is the tokens of all rows.
        """
        batch, groups, slots, size = key_cache.shape
        heads, form = q.shape[2] // size, CACHE_FORMATS[key_cache.dtype.name]
        starts = q.shape[1] * np.arange(batch + 1) if starts is None else starts
        space = self._workspace("attention", batch, positions.size, heads, groups, slots, size)
        out = np.empty_like(q)
        caches, sizes, rows = (key_cache, value_cache), (groups, slots, size, chunk), (positions, starts)
        self._run("cache_write", form, k, v, *rows, *steps, *caches, batch, *sizes)
        self._run("attention", form, q, *rows, *caches, *steps, out, batch, positions.size, heads, *sizes, space)
        self._run("attention_merge", *rows, steps[1], out, batch, heads, *sizes, space)
        return out

    def full_attention(self, q: Floats, k: Floats, v: Floats) -> Floats:
        """q, k and v [B, L, D] -> out [B, L, D]."""
        space, out = self._workspace("full_attention", *q.shape[1:]), np.empty_like(q)
        self._run("full_attention", q, k, v, out, *q.shape, space)
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
