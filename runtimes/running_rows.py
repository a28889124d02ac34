"""The cache rows of requests that run: those that decode come first, so that one step takes them all.

The prompt that is being read lies in a row behind them. Where a row ends, the last one that decodes moves into its
place; nothing else moves.
"""

from __future__ import annotations

from arriero.runtimes.backend import Backend, Cache
from arriero.runtimes.request import Request


class RunningRows:
    """One cache of as many rows as may run at once, made when the first request comes and dropped after the last."""

    def __init__(self, most: int, capacity: int) -> None:
        """Have at most `most` rows of at most `capacity` tokens."""
        self.most, self.capacity = most, capacity
        self.decoding: list[Request] = []
        self._cache: Cache | None = None
        self._reading: int | None = None  # the row of the prompt that is being read

    @property
    def cache(self) -> Cache:
        """The rows that decode, in the order of `decoding`."""
        assert self._cache is not None
        return self._cache.rows(0, len(self.decoding))

    @property
    def together(self) -> Cache:
        """The rows that decode and, as the last, the one that a prompt is being read into; between them may be others.

        Those hold nothing.
        """
        assert self._cache is not None
        assert self._reading is not None
        return self._cache.rows(0, self._reading + 1)

    @property
    def reading(self) -> Cache:
        """The one row that a prompt is being read into."""
        assert self._cache is not None
        assert self._reading is not None
        return self._cache.rows(self._reading, self._reading + 1)

    def open(self, backend: Backend, adapter: int, tokens: int) -> None:
        """Make an empty row the one to read a prompt into, with the adapter of that number and room for `tokens`."""
        if self._cache is None:
            self._cache = backend.new_cache(self.most, self.capacity)
        self._reading = len(self.decoding)
        self.reading.truncate(0, 0)
        self.reading.adapters[:] = adapter
        # at once, while the row is empty: what it held would be moved each time that it outgrows its slots
        self.reading.reserve(min(tokens, self.capacity))

    def join(self, request: Request) -> None:
        """Let `request`, whose prompt is read, decode with the others."""
        row = len(self.decoding)
        if self._reading != row:  # others have ended since it was opened
            self._move(self._reading, row)
        self._reading = None
        self.decoding.append(request)

    def abandon_reading(self) -> None:
        """Give up the row that a prompt was being read into."""
        if self._cache is not None and self._reading is not None:
            self.reading.truncate(0, 0)
        self._reading = None

    def remove(self, row: int) -> None:
        """End a row that decodes."""
        assert self._cache is not None
        last = self.decoding.pop()
        if row < len(self.decoding):
            self._move(len(self.decoding), row)
            self.decoding[row] = last
        else:
            self._cache.truncate(row, 0)

    def drop(self) -> None:
        """Give the cache's memory back; nothing runs any more."""
        self._cache = self._reading = None
        self.decoding.clear()

    def _move(self, source: int | None, target: int) -> None:
        assert self._cache is not None
        assert source is not None
        self._cache.copy_row(source, target)
        self._cache.truncate(source, 0)
