"""What several test processes share: made by the first that needs it, while the others wait."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# pytest-xdist names its workers; their temporary folders lie in one of the run.
WORKER = os.environ.get("PYTEST_XDIST_WORKER")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Within the block no other process is within the same block for `path`."""
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` of this run, filled by `make` in one of its processes."""
    run = factory.getbasetemp().parent if WORKER else factory.getbasetemp()
    folder, ready = run / name, run / f"{name}.ready"
    with locked(folder):
        if not ready.exists():
            folder.mkdir()
            make(folder)
            ready.touch()
    return folder
