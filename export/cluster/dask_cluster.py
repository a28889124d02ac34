"""A Dask cluster whose workers do the jobs of a build: `submit` sends one, and what is given back waits for it.

Workers see the build's files, its output folder and its checkpoint, at the same paths as the build. A worker that dies
takes no job with it: Dask gives it to another.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from arriero.errors import ArrieroError, MachineLacks, sentence_of
from arriero.export.machine.memory_watch import MemoryWatch
from arriero.traits import install

try:
    from distributed import CancelledError, Client
    from distributed.comm import CommClosedError
    from distributed.scheduler import KilledWorker

    from arriero.export.cluster.do_job import Task, Terms, do_task, terms_of
except ModuleNotFoundError as error:
    raise MachineLacks(
        f"the package {(error.name or 'distributed').partition('.')[0]} is not installed",
        remedy=f"Install it with `{install('cluster')}`, here and on every worker",
    ) from None

J = TypeVar("J")
R = TypeVar("R")
PATIENCE = 60  # seconds that the first worker may take to join
START = "Start it with `dask scheduler`, and workers with `dask worker ADDRESS`, and check the address"


class DaskCluster:
    """The workers behind the scheduler at `address`; `output` is the build's folder, `memory` what a job may hold."""

    def __init__(self, address: str, output: Path, memory: int | None = None) -> None:
        """Connect with the scheduler. Raises MachineLacks where it or its workers are not there."""
        self.address, self.output, self.memory = address, output, memory
        try:
            self._client: Any = Client(address, timeout=PATIENCE, set_as_default=False)
        except (OSError, ValueError) as error:
            what = f"no scheduler of a Dask cluster answers ({sentence_of(error)})"
            raise MachineLacks(what, where=address, remedy=START) from None

    @cached_property
    def _terms(self) -> Terms:
        """What the workers have to be; known while the build holds its folder."""
        return terms_of(self.output, self.memory)

    def __enter__(self) -> Self:
        try:
            self._client.wait_for_workers(1, timeout=PATIENCE)
        except TimeoutError:
            self._client.close()
            raise MachineLacks("the cluster has no workers", where=self.address, remedy=START) from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._client.close()  # which takes back what nobody waits for any more

    @property
    def workers(self) -> int:
        """How many there are now."""
        return len(self._client.scheduler_info(n_workers=-1)["workers"])

    def submit(self, function: Callable[[J], Iterator[R]], job: J) -> Callable[[], Iterator[R]]:
        """See `arriero.export.machine.jobs.Submit`."""
        future = self._client.submit(do_task, Task(pickle.dumps((function, job)), self._terms), pure=False)

        def results() -> Iterator[R]:
            try:
                outcome = future.result()
                MemoryWatch.note(outcome.peak)
                yield from outcome.results
            except KilledWorker as error:
                what = f"workers died at one job ({sentence_of(error)})"
                raise MachineLacks(what, where=self.address, remedy="See the workers' logs: is it memory?") from None
            except (CommClosedError, CancelledError) as error:
                what = f"the scheduler is gone ({sentence_of(error).splitlines()[0]})"
                remedy = "Start it again and give the same command: the build goes on where it stopped"
                raise MachineLacks(what, where=self.address, remedy=remedy) from None
            finally:
                future.release()

        return results


def check_address(address: str) -> str:
    """`address`, if a scheduler can have it. Raises ArrieroError otherwise."""
    protocol, _, place = address.partition("://")
    if protocol not in ("tcp", "tls") or not place.rpartition(":")[0] or not place.rpartition(":")[2].isdigit():
        raise ArrieroError(f"{address!r} is no scheduler's address", expected="tcp://HOST:PORT", remedy=START)
    return address
