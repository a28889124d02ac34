"""What a worker does with a job: it checks that it computes as the build would, then does one at a time.

The same bytes come out only of the same code, the same packages, the same kind of processor, and as many threads.
"""

from __future__ import annotations

import functools
import os
import pickle
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from arriero.errors import ArrieroError, MachineLacks
from arriero.export.compile.cpus import native
from arriero.export.machine.memory_watch import MemoryWatch, release_memory
from arriero.export.machine.versions import installed_versions
from arriero.export.pipeline.sources import source_hash
from arriero.export.pipeline.stages import LOCK
from arriero.profiles.piecewise import linear_algebra, linear_algebra_threads
from arriero.traits import SHARED_PACKAGES, TRAITS

SHARED = "files that the build and its workers share"
_alone = threading.Lock()  # a worker of several threads does one job at a time all the same


@dataclass(frozen=True)
class Terms:
    """What a worker has to be to do a build's jobs, and what it has to see."""

    identity: Mapping[str, str]
    threads: int
    lock: Path  # of the output folder, and what is in it
    holder: str
    memory: int | None


@dataclass(frozen=True)
class Task:
    """A function and its job, pickled, and on which terms it is to be done: these are read first."""

    work: bytes
    terms: Terms


def terms_of(output: Path, memory: int | None) -> Terms:
    """The terms of this process's build into `output`."""
    lock = output / ".work" / LOCK
    return Terms(identity(), linear_algebra_threads(), lock, lock.read_text(), memory)


@functools.cache
def identity() -> dict[str, str]:
    """What decides the last bits of a result: our code, the packages, the processor as linear algebra takes it."""
    libraries = {
        f"{one['internal_api']} {one['version']} for {one.get('architecture', 'any')}" for one in linear_algebra()
    }
    packages = (*SHARED_PACKAGES, *(package for traits in TRAITS.values() for package in traits.packages))
    return {
        "arriero's code": source_hash("export", "graphs", "profiles", "runtimes")[:12],
        "Python": ".".join(map(str, sys.version_info[:3])),
        "linear algebra": ", ".join(sorted(libraries)),
        "processor": native(),
        **installed_versions(packages),
    }


@dataclass(frozen=True)
class Outcome:
    """All that a job yielded, and the bytes of memory that it held at most."""

    results: list[Any]
    peak: int


def do_task(task: Task) -> Outcome:
    """Do a job. Raises ArrieroError/MachineLacks where this worker is not what the build needs."""
    where = f"worker {os.uname().nodename}, process {os.getpid()}"
    _check(task.terms, where)
    with _alone, threadpool_limits(task.terms.threads):
        release_memory()
        with MemoryWatch(task.terms.memory, "a worker's job") as memory:
            try:
                function, job = pickle.loads(task.work)
                results = list(function(job))
            except FileNotFoundError as error:
                what, remedy = f"lacks a file ({error})", "Mount what the build reads at the same path"
                raise ArrieroError(what, where=where, expected=SHARED, remedy=remedy) from None
        return Outcome(results, memory.peak)


def _check(terms: Terms, where: str) -> None:
    mine = identity()
    other = [
        f"{name} {mine.get(name, 'missing')} in the place of {value}"
        for name, value in terms.identity.items()
        if mine.get(name) != value
    ]
    if other:
        what = f"would not compute the bytes that the build does: it has {'; '.join(other)}"
        remedy = "Give every worker the environment and the kind of processor that the build has"
        raise MachineLacks(what, where=where, remedy=remedy)
    try:
        seen = terms.lock.read_text() == terms.holder
    except OSError:
        seen = False
    if not seen:
        what = f"does not see the build's folder {terms.lock.parents[1]}"
        raise ArrieroError(what, where=where, expected=SHARED, remedy="Mount it at the same path")
