"""A copy of what one cache row holds, to go back to: the slots that the row's next tokens may see, and no others.

Shapes: K key/value heads, P slots, D head dimension, C attention chunk.
At a multiple of C the chunked layers hold nothing, so a snapshot taken there has the global layers' slots alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from arriero.errors import ArrieroError

if TYPE_CHECKING:
    from arriero.runtimes.backend import ModelSpec

Buffer = NDArray[Any]


class JoinedBuffers(Sequence[Buffer]):
    """Buffers [K, P, D] of layers, each put together of its parts when it is asked for: no two need memory at once."""

    def __init__(self, layers: Sequence[Sequence[Buffer]], slots: Sequence[int]) -> None:
        """Have so many `slots` of each layer, the first of its parts [K, .., D] laid one behind the other."""
        self._layers, self._slots = layers, slots

    def __len__(self) -> int:
        return len(self._layers)

    @overload
    def __getitem__(self, number: int) -> Buffer: ...

    @overload
    def __getitem__(self, number: slice) -> list[Buffer]: ...

    def __getitem__(self, number: int | slice) -> Buffer | list[Buffer]:
        if isinstance(number, slice):
            return [self[one] for one in range(len(self))[number]]
        return np.concatenate(self._layers[number], axis=1)[:, : self._slots[number]]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One row's tokens, apart from any cache: per layer keys and values [K, P, D] in the cache's own dtype.

    P is the row's length in a global layer, and the tokens since the chunk's start in a chunked one; those before
    `start` are left out of both. `adapter` is the number of the adapter that the tokens were read with.
    """

    spec: ModelSpec
    length: int
    keys: Sequence[Buffer]
    values: Sequence[Buffer]
    adapter: int = 0
    start: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(buffer.nbytes for buffer in (*self.keys, *self.values))

    def check_whole(self, spec: ModelSpec) -> None:
        """Refuse a cache of another model, and a copy that leaves tokens out."""
        if self.start:
            raise ArrieroError(f"the snapshot leaves out {self.start} tokens", remedy="Restore one of the whole row")
        if spec != self.spec:
            raise self._foreign("is of another model than the cache")

    def check_shapes(self) -> None:
        """Refuse arrays that are not those of a whole row: what a file says of them is a stranger's word."""
        held = slots_held(self.spec, self.length)
        shapes = [(self.spec.num_key_value_heads, slots, self.spec.head_dim) for slots in held]
        if any([buffer.shape for buffer in buffers] != shapes for buffers in (self.keys, self.values)):
            raise ValueError(f"its keys and values are not those of {self.length} tokens")

    def check_dtype(self, dtype: np.dtype[Any]) -> None:
        """Refuse a cache that keeps another dtype than this was copied from."""
        if dtype != self.keys[0].dtype:
            raise self._foreign(f"holds {self.keys[0].dtype} and the cache {dtype}")

    def _foreign(self, difference: str) -> ArrieroError:
        return ArrieroError(
            f"the snapshot {difference}",
            remedy="Restore it into a cache of the bundle that it was taken from, or read the prompt again",
        )


def slots_since(spec: ModelSpec, start: int, length: int) -> list[slice]:
    """Which slots of each layer hold the tokens from `start` on that the next token of the row may see."""
    edge = length - length % spec.attention_chunk_size
    first = max(start - edge, 0)
    chunked, whole = slice(first, max(length - edge, first)), slice(start, length)
    return [chunked if layer.attention == "chunked" else whole for layer in spec.layers]


def slots_held(spec: ModelSpec, length: int) -> list[int]:
    """How many slots of each layer hold tokens that the next token of a row of `length` tokens may see."""
    since = length % spec.attention_chunk_size
    return [since if layer.attention == "chunked" else length for layer in spec.layers]


def check_truncation(spec: ModelSpec, length: int, shorter: int) -> None:
    """Refuse to cut a row of `length` tokens to `shorter` where the chunked layers' slots are overwritten."""
    if not 0 <= shorter <= length:
        raise ArrieroError(
            f"a row of {length} tokens cannot be truncated to {shorter}", expected=f"a length from 0 to {length}"
        )
    chunk = spec.attention_chunk_size
    start = length // chunk * chunk
    if shorter < start and shorter % chunk:
        raise ArrieroError(
            f"a row of {length} tokens cannot be truncated to {shorter}: a chunked layer keeps position p in slot "
            f"p % {chunk}, so tokens before position {start} are overwritten",
            expected=f"a length from {start} to {length}, or a multiple of {chunk}",
            remedy="Restore a snapshot that was taken at that length, or truncate to a multiple and read on from there",
        )
