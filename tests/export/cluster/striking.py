"""What the tests do to a cluster's workers, from inside them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from arriero.export.calibration import round_matrices
from arriero.export.calibration.round_matrices import ExpertJob
from arriero.export.cluster import do_job

own_identity = do_job.identity


def die_once(marks: Path, layer: int, expert: int) -> None:
    """Let whichever worker first has half of this expert behind it die without a word, and note each job's process."""
    whole = round_matrices.round_expert

    def round_expert(job: ExpertJob) -> Iterator[Any]:
        (marks / f"{job.layer}-{job.expert}-{os.getpid()}").touch()
        for number, one in enumerate(whole(job)):
            yield one
            if (job.layer, job.expert, number) == (layer, expert, 0) and not (marks / "died").exists():
                (marks / "died").write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)

    round_matrices.round_expert = round_expert


def always_die(job: int) -> Iterator[int]:
    """A job that no worker survives."""
    os.kill(os.getpid(), signal.SIGKILL)
    yield job


def count_threads(job: int) -> Iterator[int]:
    """The threads that linear algebra has within a job."""
    yield from (one["num_threads"] for one in do_job.threadpool_info() if one["user_api"] == "blas")


def take_memory(job: int) -> Iterator[int]:
    """Hold `job` bytes for as long as it takes to be seen."""
    held = bytearray(job)
    held[::4096] = b"x" * len(held[::4096])
    for _ in range(10_000_000):
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
