"""Linear algebra piece by piece: as many pieces at once as it has threads, each of them on one.

A product of small matrices on several threads waits for the slowest, and where a processor has other work too, for
its turn: threads that share nothing do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

from threadpoolctl import threadpool_info, threadpool_limits

T = TypeVar("T")


class Each(Protocol):
    """Does something to each piece of so many rows."""

    def __call__(self, work: Callable[[slice], T], rows: int, size: int) -> list[T]:
        """What `work` makes of each `size` of so many `rows`, in their order; what it raises is raised here."""


@contextmanager
def piecewise() -> Iterator[Each]:
    """Within, numpy multiplies on one thread, and what is given runs pieces on as many threads as it had before."""
    threads = max((one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"), default=1)
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads) as pool:

        def each(work: Callable[[slice], T], rows: int, size: int) -> list[T]:
            pieces = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
            return list(pool.map(work, pieces)) if len(pieces) > 1 else [*map(work, pieces)]

        yield each
