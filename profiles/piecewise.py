"""Linear algebra piece by piece: as many pieces at once as it has threads, each of them on one.

A product of small matrices on several threads waits for the slowest, and where a processor has other work too, for
its turn: threads that share nothing do not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from threadpoolctl import ThreadpoolController

T = TypeVar("T")


class Each(Protocol):
    """Does something to each piece of so many rows."""

    def __call__(self, work: Callable[[slice], T], rows: int, size: int) -> list[T]:
        """What `work` makes of each `size` of so many `rows`, in their order; what it raises is raised here."""


@functools.cache
def _libraries() -> ThreadpoolController:
    """The libraries that numpy multiplies with; looking through all that a process has loaded takes milliseconds."""
    loaded = ThreadpoolController().select(user_api="blas")
    own = [one["filepath"] for one in loaded.info() if "numpy" in one["filepath"]]
    return loaded.select(filepath=own) if own else loaded  # others may be there for other ends


def linear_algebra() -> list[dict[str, Any]]:
    """The libraries that numpy multiplies with, as `threadpoolctl` describes them now."""
    described: list[dict[str, Any]] = _libraries().info()
    return described


def linear_algebra_threads() -> int:
    """How many threads they are set to."""
    return max((one["num_threads"] for one in linear_algebra()), default=1)


def in_pieces(work: Callable[[slice], T], rows: int, size: int) -> list[T]:
    """What `work` makes of each `size` of so many `rows`, as `piecewise` has it; of no more than one here and now."""
    if rows <= size:
        return [work(slice(0, rows))]
    with piecewise() as each:
        return each(work, rows, size)


@contextmanager
def piecewise() -> Iterator[Each]:
    """Within, numpy multiplies on one thread, and what is given runs pieces on as many threads as it had before."""
    threads = linear_algebra_threads()
    with _libraries().limit(limits=1), ThreadPoolExecutor(threads) as pool:

        def each(work: Callable[[slice], T], rows: int, size: int) -> list[T]:
            pieces = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
            return list(pool.map(work, pieces))

        yield each
