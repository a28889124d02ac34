"""Key and value buffers in numpy: chunked layers keep the current chunk only, global layers all tokens.

Shapes: B batch rows, K key/value heads, P slots of a buffer, D head dimension, C attention chunk.
Buffers are f32, or f16 or i8 where the graph rounds keys and values: what a code stands for only the graph knows. All
rows have as many slots, but only those that hold tokens take memory. Kernels that read no slot without a token get all
slots at once; for others the slots grow by doubling, as the longest row needs them.
A token at position p lies in slot p % C of a chunked layer and in slot p of a global one, so the lengths alone say
which slots are valid: starting a new chunk moves nothing and clears nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from arriero.errors import ArrieroError
from arriero.runtimes.backend import Ints, LayerSpec, ModelSpec
from arriero.runtimes.cache_rows import CacheRows, RowStore
from arriero.runtimes.lazy_memory import give_back, lazy_zeros
from arriero.runtimes.snapshot import Buffer, Snapshot, slots_held, slots_since

FIRST_SLOTS = 256


class KVCache(RowStore):
    """The [B, K, P, D] buffers of every layer, and how many tokens each row holds."""

    def __init__(
        self, spec: ModelSpec, batch: int, capacity: int, dtype: DTypeLike = np.float32, *, at_once: bool = False
    ) -> None:
        """Make empty buffers for `batch` rows of at most `capacity` tokens.

        `at_once`: with all their slots, so that none is ever moved, where the system has addresses for them.
        """
        super().__init__(spec, batch, capacity)
        self.dtype = np.dtype(dtype)
        self.chunked_limit = min(spec.attention_chunk_size, capacity)
        self.has_all_slots = at_once  # no step moves a buffer
        if at_once:
            with suppress(OSError, OverflowError):  # `ulimit -v`, or a system that promises no more than it has
                self.keys, self.values = (self._buffers(capacity) for _ in range(2))
                return
            self.has_all_slots = False
        self.keys, self.values = (self._buffers(FIRST_SLOTS) for _ in range(2))

    def _buffers(self, slots: int) -> list[Buffer]:
        """One of each layer, with at most so many slots."""
        heads, dim = self.spec.num_key_value_heads, self.spec.head_dim
        limits = [min(slots, self._limit(layer)) for layer in self.spec.layers]
        return [lazy_zeros((len(self.lengths), heads, limit, dim), self.dtype) for limit in limits]

    def _limit(self, layer: LayerSpec) -> int:
        return self.chunked_limit if layer.attention == "chunked" else self.capacity

    def copy_row(self, source: int, target: int) -> None:
        """Make row `target` hold what row `source` holds."""
        held = slots_held(self.spec, int(self.lengths[source]))
        for buffers in (self.keys, self.values):
            for buffer, slots in zip(buffers, held, strict=True):
                buffer[target, :, :slots] = buffer[source, :, :slots]
        self.lengths[target] = self.lengths[source]

    def truncate(self, row: int, length: int) -> None:
        """Keep the first `length` tokens of `row`; one that keeps none gives its memory back."""
        super().truncate(row, length)
        if length == 0:
            for buffer in (*self.keys, *self.values):
                give_back(buffer[row])

    def snapshot(self, row: int, start: int = 0) -> Snapshot:
        """Copy what `row` holds of the tokens from `start` on."""
        length = int(self.lengths[row])
        held = slots_since(self.spec, start, length)
        keys, values = (
            tuple(buffer[row, :, slots].copy() for buffer, slots in zip(buffers, held, strict=True))
            for buffers in (self.keys, self.values)
        )
        return Snapshot(self.spec, length, keys, values, start=start)

    def restore(self, row: int, snapshot: Snapshot) -> None:
        """Make `row` hold what `snapshot` was taken of."""
        snapshot.check_dtype(self.dtype)
        self.reserve(snapshot.length)
        for buffers, copies in ((self.keys, snapshot.keys), (self.values, snapshot.values)):
            for buffer, copy in zip(buffers, copies, strict=True):
                buffer[row, :, : copy.shape[1]] = copy
        self.lengths[row] = snapshot.length

    def reserve(self, tokens: int) -> None:
        """Make sure every layer has slots for rows of `tokens` tokens; refuses more than `capacity`."""
        check_room(tokens, self.capacity)
        if self.has_all_slots:
            return
        for number, layer in enumerate(self.spec.layers):
            limit = self._limit(layer)
            have = self.keys[number].shape[2]
            if min(tokens, limit) > have:
                slots = grown_slots(have, tokens, limit)
                held = [slots_held(self.spec, length)[number] for length in self.lengths.tolist()]
                self.keys[number] = _grown(self.keys[number], slots, held)
                self.values[number] = _grown(self.values[number], slots, held)

    def layer(self, number: int, start: int = 0, stop: int | None = None) -> tuple[Buffer, Buffer]:
        """Layer `number`'s keys and values [B, K, P, D] of rows `start` to `stop`, contiguous, in place."""
        return self.keys[number][start:stop], self.values[number][start:stop]


def check_room(tokens: int, capacity: int) -> None:
    """Refuse more tokens than a cache may hold."""
    if tokens > capacity:
        raise ArrieroError(
            f"{tokens} tokens do not fit a cache of {capacity}",
            remedy="Shorten the prompt, ask for fewer tokens, or build the bundle with a larger `context`",
        )


def grown_slots(have: int, tokens: int, limit: int) -> int:
    """How many slots a buffer of `have` grows to, by doubling, so that `tokens` of at most `limit` fit."""
    while have < min(tokens, limit):
        have = min(2 * have, limit)
    return have


def check_step(positions: Ints, cache: CacheRows[Any]) -> None:
    """Refuse a step that kernels over these buffers cannot take: see `Backend.forward`. Raises ValueError."""
    batch, steps = positions.shape
    chunk = cache.spec.attention_chunk_size
    first = cache.lengths.tolist()  # of few rows, and a token waits longer for numpy
    if steps > 1 and (batch > 1 or first[0] // chunk != (first[0] + steps - 1) // chunk):
        raise ValueError("a step is one row inside one attention chunk, or one token per row")
    if positions.tolist() != [list(range(start, start + steps)) for start in first]:
        raise ValueError("positions must continue the cache")


def valid_slots(lengths: Ints, attention: str, chunk: int) -> Ints:
    """How many past slots [B] the next token of each row may see: since its chunk's start, or all of them."""
    return lengths % chunk if attention == "chunked" else lengths.copy()


def _grown(buffer: Buffer, slots: int, held: Sequence[int]) -> Buffer:
    """`buffer` with room for `slots`, and of each row the slots `held`."""
    batch, heads, _, dim = buffer.shape
    larger = lazy_zeros((batch, heads, slots, dim), buffer.dtype)
    for row, count in enumerate(held):
        larger[row, :, :count] = buffer[row, :, :count]
    return larger
