"""Key and value buffers in a GPU's memory, laid out and grown as `KVCache` does it in numpy.

Shapes: B batch rows, K key/value heads, P slots of a buffer, D head dimension, C attention chunk.
A step reads and writes them where they lie; growing moves them, so that addresses hold from one growth to the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from arriero.runtimes.backend import ModelSpec
from arriero.runtimes.cache import FIRST_SLOTS, check_room, grown_slots
from arriero.runtimes.cache_rows import RowStore
from arriero.runtimes.nvidia.cuda import Memory, Pinned, Stream
from arriero.runtimes.snapshot import Buffer, Snapshot, slots_held, slots_since


@dataclass(frozen=True)
class SlotLimits:
    """The fewest and the most slots that the engine takes of one class of layers, chunked or global."""

    least: int
    most: int


@dataclass(frozen=True, eq=False)
class CacheBindings:
    """Where the keys and values of some rows lie: one object from one growth of the cache to the next.

    `inputs` are the pasts by name, each an address and a shape; `outputs` the presents, which are the same memory: a
    step writes its own slots and copies nothing.
    """

    inputs: dict[str, tuple[int, tuple[int, ...]]]
    outputs: dict[str, int]


NO_CACHE = CacheBindings({}, {})


class DeviceCache(RowStore):
    """The [B, K, P, D] buffers of every layer on a GPU, and how many tokens each row holds."""

    def __init__(
        self,
        stream: Stream,
        spec: ModelSpec,
        batch: int,
        capacity: int,
        dtype: np.dtype[Any],
        slots: Mapping[str, SlotLimits],
    ) -> None:
        """Make empty buffers for `batch` rows of at most `capacity` tokens, of values that are `dtype` on the host.

        `stream` does the cache's own work: clearing, growing, copying rows; each is done when its method returns.
        `slots` are the engine's limits for `chunked` and `global` layers. Raises MachineLacks when the GPU is full.
        """
        super().__init__(spec, batch, capacity)
        self.batch, self.dtype = batch, dtype
        self._row = spec.num_key_value_heads  # rows of P * D values that one row of the batch has
        self._slot = spec.head_dim * dtype.itemsize  # bytes
        self._limits = {
            "chunked": SlotLimits(slots["chunked"].least, max(min(spec.attention_chunk_size, capacity), 1)),
            "global": SlotLimits(slots["global"].least, max(capacity, 1)),
        }
        self._slots: list[int] = []
        self._keys: list[Memory] = []
        self._values: list[Memory] = []
        self._bindings: dict[tuple[int, int], CacheBindings] = {}
        self._fits = 0  # tokens that fit without growing
        self._stream = stream
        with self._finished():
            for layer in spec.layers:
                limit = self._limits[layer.attention]
                # an engine may have a least size of its own, whatever the capacity
                self._slots.append(max(min(FIRST_SLOTS, limit.most), limit.least))
                self._keys.append(self._empty(self._slots[-1]))
                self._values.append(self._empty(self._slots[-1]))

    @contextmanager
    def _finished(self) -> Iterator[None]:
        """What the block queues is done after it, even when it fails: then its memory is dropped."""
        try:
            yield
            self._stream.wait()
        except BaseException:
            self._stream.settle()
            raise

    def _empty(self, slots: int) -> Memory:
        # Zeros, not leftovers: a slot beyond the row's tokens has weight zero in attention, and 0 * NaN is NaN.
        nbytes = self.batch * self._row * slots * self._slot
        memory = self._stream.device.memory(nbytes)
        self._stream.zero(memory.address, nbytes)
        return memory

    def copy_row(self, source: int, target: int) -> None:
        """Make row `target` hold what row `source` holds."""
        if source != target:
            with self._finished():
                for slots, *pair in zip(self._slots, self._keys, self._values, strict=True):
                    nbytes = self._row * slots * self._slot
                    for memory in pair:
                        self._stream.within(memory.address + target * nbytes, memory.address + source * nbytes, nbytes)
        self.lengths[target] = self.lengths[source]

    def snapshot(self, row: int, start: int = 0) -> Snapshot:
        """Copy what `row` holds of the tokens from `start` on to the host's memory."""
        length = int(self.lengths[row])
        held = slots_since(self.spec, start, length)
        with self._staging([slots.stop - slots.start for slots in held]) as staging:
            keys, values = (
                tuple(self._read(memory, row, number, held[number], staging) for number, memory in enumerate(memories))
                for memories in (self._keys, self._values)
            )
        return Snapshot(self.spec, length, keys, values, start=start)

    def restore(self, row: int, snapshot: Snapshot) -> None:
        """Make `row` hold what `snapshot` was taken of."""
        snapshot.check_dtype(self.dtype)
        self.reserve(snapshot.length)
        with self._staging(slots_held(self.spec, snapshot.length)) as staging:
            for memories, copies in ((self._keys, snapshot.keys), (self._values, snapshot.values)):
                for number, (memory, copy) in enumerate(zip(memories, copies, strict=True)):
                    self._write(memory, row, number, copy, staging)
        self.lengths[row] = snapshot.length

    @contextmanager
    def _staging(self, held: list[int]) -> Iterator[Pinned]:
        """Pinned memory for one layer's keys or values of a row: what a copy between host and GPU goes through."""
        staging = self._stream.device.pinned(self._row * max(held) * self._slot)
        try:
            yield staging
        finally:
            staging.free()

    def _read(self, memory: Memory, row: int, number: int, held: slice, staging: Pinned) -> Buffer:
        """A copy [K, P, D] of the slots `held` of `row` in layer `number`'s keys or values."""
        pitch, count = self._slots[number] * self._slot, held.stop - held.start
        address = memory.address + row * self._row * pitch + held.start * self._slot
        with self._finished():
            self._stream.gather(staging, address, pitch, count * self._slot, self._row)
        return staging.array((self._row, count, self.spec.head_dim), self.dtype).copy()

    def _write(self, memory: Memory, row: int, number: int, copy: Buffer, staging: Pinned) -> None:
        """Put `copy` [K, held, D] into the first slots of `row` in layer `number`'s keys or values."""
        pitch = self._slots[number] * self._slot
        staging.array(copy.shape, self.dtype)[...] = copy
        with self._finished():
            self._stream.scatter(
                memory.address + row * self._row * pitch, pitch, staging, copy.shape[1] * self._slot, self._row
            )

    def reserve(self, tokens: int) -> None:
        """Make sure every layer has slots for rows of `tokens` tokens; refuses more than `capacity`."""
        check_room(tokens, self.capacity)
        if tokens <= self._fits:
            return
        for number, layer in enumerate(self.spec.layers):
            have, limit = self._slots[number], self._limits[layer.attention].most
            if min(tokens, limit) > have:
                slots = grown_slots(have, tokens, limit)
                # both or none: a GPU that is full in between must leave the layer as it was
                with self._finished():
                    keys, values = [self._grown(part[number], slots, have) for part in (self._keys, self._values)]
                self._keys[number], self._values[number], self._slots[number] = keys, values, slots
                self._bindings.clear()
        growing = zip(self._slots, self.spec.layers, strict=True)
        ends = [slots for slots, layer in growing if slots < self._limits[layer.attention].most]
        self._fits = min(ends, default=self.capacity)

    def _grown(self, memory: Memory, slots: int, have: int) -> Memory:
        larger = self._empty(slots)
        rows = self.batch * self._row
        self._stream.spread(larger.address, slots * self._slot, memory.address, have * self._slot, rows)
        return larger

    def layer(self, number: int, start: int = 0) -> tuple[int, int, int]:
        """The addresses of layer `number`'s keys and values from row `start` on, and its slots P."""
        slots = self._slots[number]
        skip = start * self._row * slots * self._slot
        return self._keys[number].address + skip, self._values[number].address + skip, slots

    def bindings(self, start: int, stop: int) -> CacheBindings:
        """Where the buffers of rows `start` to `stop` lie, under their names in the engine."""
        if (start, stop) not in self._bindings:
            inputs: dict[str, tuple[int, tuple[int, ...]]] = {}
            outputs: dict[str, int] = {}
            for number in range(len(self._slots)):
                *addresses, slots = self.layer(number, start)
                shape = (stop - start, self.spec.num_key_value_heads, slots, self.spec.head_dim)
                for kind, address in zip(("key", "value"), addresses, strict=True):
                    inputs[f"past_{kind}.{number}"] = address, shape
                    outputs[f"present_{kind}.{number}"] = address
            self._bindings[start, stop] = CacheBindings(inputs, outputs)
        return self._bindings[start, stop]
