"""Key and value buffers in numpy: chunked layers keep the current chunk only, global layers grow by doubling.

Shapes: B batch rows, K key/value heads, P slots of a buffer, D head dimension, C attention chunk.
Buffers are f32, or i8 where the graph rounds keys and values: what a code stands for only the graph knows.
A token at position p lies in slot p % C of a chunked layer and in slot p of a global one, so the lengths alone say
which slots are valid: starting a new chunk moves nothing and clears nothing.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from arriero.errors import ArrieroError
from arriero.runtimes.backend import Ints, ModelSpec

FIRST_SLOTS = 256
Buffer = NDArray[Any]


class KVCache:
    """The [B, K, P, D] buffers of every layer, and how many tokens each row holds."""

    def __init__(self, spec: ModelSpec, batch: int, capacity: int, dtype: DTypeLike = np.float32) -> None:
        """Make empty buffers for `batch` rows of at most `capacity` tokens; slots are added as tokens come."""
        self.spec, self.capacity = spec, capacity
        self.lengths: Ints = np.zeros(batch, np.int64)
        self.chunked_limit = min(spec.attention_chunk_size, capacity)
        self.keys: list[Buffer] = []
        self.values: list[Buffer] = []
        for layer in spec.layers:
            slots = min(FIRST_SLOTS, self.chunked_limit if layer.attention == "chunked" else capacity)
            shape = (batch, spec.num_key_value_heads, slots, spec.head_dim)
            self.keys.append(np.zeros(shape, dtype))
            self.values.append(np.zeros(shape, dtype))

    def rows(self, start: int, stop: int) -> RowView:
        """Rows `start` to `stop` as a cache that shares this one's memory and lengths."""
        return RowView(self, start, stop)

    def copy_row(self, source: int, target: int) -> None:
        """Make row `target` hold what row `source` holds."""
        for buffer in (*self.keys, *self.values):
            buffer[target] = buffer[source]
        self.lengths[target] = self.lengths[source]

    def reserve(self, tokens: int) -> None:
        """Make sure every layer has slots for rows of `tokens` tokens; refuses more than `capacity`."""
        check_room(tokens, self.capacity)
        for number, layer in enumerate(self.spec.layers):
            limit = self.chunked_limit if layer.attention == "chunked" else self.capacity
            have = self.keys[number].shape[2]
            if min(tokens, limit) > have:
                slots = grown_slots(have, tokens, limit)
                self.keys[number] = _grown(self.keys[number], slots)
                self.values[number] = _grown(self.values[number], slots)

    def layer(self, number: int) -> tuple[Buffer, Buffer]:
        """Give layer `number`'s key and value buffers [B, K, P, D], contiguous, in place."""
        return self.keys[number], self.values[number]

    def valid(self, attention: str) -> Ints:
        """Give how many slots of each row [B] hold tokens that the row's next token may see."""
        return valid_slots(self.lengths, attention, self.spec.attention_chunk_size)


class RowView:
    """Some neighbouring rows of a `KVCache`, with the same methods."""

    def __init__(self, whole: KVCache, start: int, stop: int) -> None:
        """View rows `start` to `stop` of `whole`."""
        self._whole, self._start, self._stop = whole, start, stop
        self.spec, self.capacity = whole.spec, whole.capacity
        self.lengths: Ints = whole.lengths[start:stop]

    def rows(self, start: int, stop: int) -> RowView:
        """Rows `start` to `stop` of these rows."""
        return RowView(self._whole, self._start + start, self._start + stop)

    def copy_row(self, source: int, target: int) -> None:
        """Make row `target` of these rows hold what row `source` of them holds."""
        self._whole.copy_row(self._start + source, self._start + target)

    def reserve(self, tokens: int) -> None:
        """Make sure every layer has slots for rows of `tokens` tokens."""
        self._whole.reserve(tokens)

    def layer(self, number: int) -> tuple[Buffer, Buffer]:
        """Give these rows of layer `number`'s key and value buffers, contiguous, in place."""
        keys, values = self._whole.layer(number)
        return keys[self._start : self._stop], values[self._start : self._stop]

    def valid(self, attention: str) -> Ints:
        """Give how many slots of each row hold tokens that the row's next token may see."""
        return valid_slots(self.lengths, attention, self.spec.attention_chunk_size)


class Step(Protocol):
    """What `check_step` looks at: of any cache that is laid out like these."""

    spec: ModelSpec
    lengths: Ints


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


def check_step(positions: Ints, cache: Step) -> None:
    """Refuse a step that kernels over these buffers cannot take: see `Backend.forward`. Raises ValueError."""
    batch, steps = positions.shape
    chunk = cache.spec.attention_chunk_size
    first = cache.lengths
    crosses = bool(np.any(first // chunk != (first + steps - 1) // chunk))
    if (batch > 1 and steps > 1) or crosses:
        raise ValueError("a step is one row inside one attention chunk, or one token per row")
    if not np.array_equal(positions, first[:, None] + np.arange(steps)):
        raise ValueError("positions must continue the cache")


def valid_slots(lengths: Ints, attention: str, chunk: int) -> Ints:
    """How many past slots [B] the next token of each row may see: since its chunk's start, or all of them."""
    return lengths % chunk if attention == "chunked" else lengths.copy()


def _grown(buffer: Buffer, slots: int) -> Buffer:
    batch, heads, have, dim = buffer.shape
    larger = np.zeros((batch, heads, slots, dim), buffer.dtype)
    larger[:, :, :have] = buffer
    return larger
