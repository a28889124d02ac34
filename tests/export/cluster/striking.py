"""What the tests do to a cluster's workers, from inside them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distributed import WorkerPlugin
from threadpoolctl import threadpool_info

from arriero.export.calibration import round_matrices
from arriero.export.calibration.round_matrices import ExpertJob
from arriero.export.cluster import do_job
from arriero.export.pipeline.target_build import TargetBuild

own_identity = do_job.identity


class Strike(WorkerPlugin):
    """Lets whoever first has half of an expert, or of a target's lowering, behind it die without a word.

    `marks` gets a file for each job and process, and one for each death.
    """

    name = "strike"

    def __init__(self, marks: Path, layer: int, expert: int, target: str) -> None:
        self.marks, self.layer, self.expert, self.target = marks, layer, expert, target

    def setup(self, worker: Any) -> None:
        """Arm a worker, those too that come in the place of dead ones."""
        self.whole = round_matrices.round_expert, TargetBuild.compile
        round_matrices.round_expert = self.round_expert
        TargetBuild.compile = lambda *arguments: self.compile(*arguments)  # type: ignore[method-assign, assignment]

    def teardown(self, worker: Any) -> None:
        """Disarm it."""
        round_matrices.round_expert, TargetBuild.compile = self.whole  # type: ignore[method-assign]

    def round_expert(self, job: ExpertJob) -> Iterator[Any]:
        """In the place of the function of that name."""
        self.mark(f"round-{job.layer}-{job.expert}")
        for one in self.whole[0](job):
            yield one
            if (job.layer, job.expert) == (self.layer, self.expert):
                self.die_once("died-rounding")

    def compile(self, target: TargetBuild, *arguments: Any) -> Any:
        """In the place of the method of that name, after the weights were written."""
        self.mark(f"lower-{target.target.name}")
        if target.target.name == self.target:
            self.die_once("died-lowering")
        return self.whole[1](target, *arguments)

    def mark(self, what: str) -> None:
        """Leave a file that says what this process was at."""
        (self.marks / f"{what}-{os.getpid()}").touch()

    def die_once(self, name: str) -> None:
        """Die, unless somebody did."""
        if not (self.marks / name).exists():
            (self.marks / name).write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)


def always_die(job: int) -> Iterator[int]:
    """A job that no worker survives."""
    os.kill(os.getpid(), signal.SIGKILL)
    yield job


def wait_for(file: Path) -> Iterator[int]:
    """A job that ends when there is a file."""
    while not file.exists():
        time.sleep(0.05)
    yield 1


def read(file: Path) -> Iterator[str]:
    """What is in a file."""
    yield file.read_text()


def count_threads(job: int) -> Iterator[int]:
    """The threads that linear algebra has within a job, in whatever libraries were loaded."""
    yield from {one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"}


def take_memory(job: int) -> Iterator[int]:
    """Hold `job` bytes for as long as it takes to be seen."""
    held = bytearray(job)
    held[::4096] = b"x" * len(held[::4096])
    end = time.monotonic() + 2
    while time.monotonic() < end:
        held[0] ^= 1
    yield len(held)


def refuse(job: int) -> Iterator[int]:
    """Raise the two kinds of errors that a job may have for users."""
    from arriero.errors import ArrieroError, Problems

    one = ArrieroError("is odd", where="here", expected="even", remedy="Add 1")
    raise one if job == 1 else Problems("several", [one, one])
    yield job


def pretend_other_code() -> None:
    """Have another version of ours in the worker."""
    terms = {**own_identity(), "arriero's code": "0123456789ab"}
    do_job.identity = lambda: terms  # type: ignore[assignment]


def pretend_no_more() -> None:
    """Have the build's version in the worker."""
    do_job.identity = own_identity
