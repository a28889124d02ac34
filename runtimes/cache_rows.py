"""The cache that a session sees: some neighbouring rows of a store, which is where their keys and values lie.

A store numbers its rows from 0 and knows how to copy, save and restore one; `CacheRows` counts from its own first row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Generic, TypeVar

import numpy as np

from arriero.runtimes.backend import Ints, ModelSpec
from arriero.runtimes.snapshot import Snapshot, check_truncation


class RowStore(ABC):
    """The keys and values of B rows in one kind of memory; of each row how many tokens it holds, and its adapter."""

    def __init__(self, spec: ModelSpec, batch: int, capacity: int) -> None:
        """Hold `batch` empty rows of at most `capacity` tokens."""
        self.spec, self.capacity = spec, capacity
        self.lengths: Ints = np.zeros(batch, np.int64)
        self.adapters: Ints = np.zeros(batch, np.int64)

    @abstractmethod
    def reserve(self, tokens: int) -> None:
        """Make sure that rows of `tokens` tokens have slots; refuses more than `capacity`."""

    @abstractmethod
    def copy_row(self, source: int, target: int) -> None:
        """Make row `target` hold what row `source` holds."""

    @abstractmethod
    def snapshot(self, row: int, start: int) -> Snapshot:
        """Copy what `row` holds of the tokens from `start` on."""

    @abstractmethod
    def restore(self, row: int, snapshot: Snapshot) -> None:
        """Make `row` hold what `snapshot`, of this model, was taken of; refuses another dtype, or too many tokens."""

    def truncate(self, row: int, length: int) -> None:
        """Keep the first `length` tokens of `row`, where `check_truncation` allows it."""
        # the length alone says which slots are valid
        self.lengths[row] = length


Store = TypeVar("Store", bound=RowStore)


class CacheRows(Generic[Store]):
    """Rows `start` to `stop` of a store, as the `Cache` that a backend steps."""

    def __init__(self, store: Store, start: int, stop: int) -> None:
        """View rows `start` to `stop` of `store`; memory, lengths and adapters are shared with it."""
        self.store, self.start, self.stop = store, start, stop
        self.lengths: Ints = store.lengths[start:stop]
        self.adapters: Ints = store.adapters[start:stop]

    @classmethod
    def whole(cls, store: Store) -> CacheRows[Store]:
        """All rows of `store`."""
        return cls(store, 0, len(store.lengths))

    @property
    def spec(self) -> ModelSpec:
        """The model whose keys and values these are."""
        return self.store.spec

    @property
    def capacity(self) -> int:
        """Most tokens a row may hold."""
        return self.store.capacity

    def rows(self, start: int, stop: int) -> CacheRows[Store]:
        """Rows `start` to `stop` of these rows."""
        return CacheRows(self.store, self.start + start, self.start + stop)

    def reserve(self, tokens: int) -> None:
        """Make sure that rows of `tokens` tokens have slots."""
        self.store.reserve(tokens)

    def copy_row(self, source: int, target: int) -> None:
        """Make row `target` equal to row `source`."""
        self.store.copy_row(self.start + source, self.start + target)
        self.adapters[target] = self.adapters[source]

    def truncate(self, row: int, length: int) -> None:
        """Keep the first `length` tokens of `row`; see `Cache.truncate`."""
        check_truncation(self.spec, int(self.lengths[row]), length)
        self.store.truncate(self.start + row, length)

    def snapshot(self, row: int, start: int = 0) -> Snapshot:
        """Copy what `row` holds; see `Cache.snapshot`."""
        return replace(self.store.snapshot(self.start + row, start), adapter=int(self.adapters[row]))

    def restore(self, row: int, snapshot: Snapshot) -> None:
        """Make `row` hold what `snapshot` was taken of; see `Cache.restore`."""
        snapshot.check_whole(self.spec)
        self.store.restore(self.start + row, snapshot)
        self.adapters[row] = snapshot.adapter
