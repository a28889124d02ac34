"""What TVM's runtime keeps of the memory that steps computed in, bounded.

Its pool hands memory out again to a step of the very same size and to no other, and keeps all of it: a server whose
steps have ever other numbers of tokens would hold the memory of every one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

KEPT = 2  # times the largest step's memory that is kept for further steps, itself included


class StepMemory:
    """Has the pool emptied before it would keep more than a few steps' memory."""

    def __init__(self, largest: int, empty: Callable[[], object]) -> None:
        """`largest` bytes are what the largest usual step computes in, `empty` drops what no step uses."""
        self._largest, self._empty = largest, empty
        self._sizes: set[Hashable] = set()  # of the steps whose memory may be kept
        self._kept = 0

    def before(self, size: Hashable, nbytes: int) -> None:
        """A step is about to compute in `nbytes`; one of the same `size` takes the very same memory."""
        if size in self._sizes:
            return
        self._largest = max(self._largest, nbytes)
        if self._kept + nbytes > KEPT * self._largest:
            self._empty()
            self._sizes.clear()
            self._kept = 0
        self._sizes.add(size)
        self._kept += nbytes
