"""Who does the jobs of a build: this process by itself, or what a cluster's workers take off it.

A job is a value that can be sent: it says all that its function needs beside the files that every worker sees. Results
come one by one, so that the process by itself holds no more than one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol, TypeVar

J = TypeVar("J")
R = TypeVar("R")


class Told(list[str]):
    """What a job told where nobody listens: sentences for whoever asked for it."""

    def __call__(self, sentence: str) -> None:
        """Keep a sentence."""
        self.append(sentence)


class Submit(Protocol):
    """Gives a job to whoever does it; what is given back waits for its results, or raises what went wrong."""

    def __call__(self, function: Callable[[J], Iterator[R]], job: J) -> Callable[[], Iterator[R]]:
        """Have `function` of `job` done; call the result to get what it yields."""
        ...


def do_here(function: Callable[[J], Iterator[R]], job: J) -> Callable[[], Iterator[R]]:
    """A `Submit` that does each job in this process, when its results are asked for."""
    return partial(function, job)
