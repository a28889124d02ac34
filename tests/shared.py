"""What several test processes share: made by the first that needs it, while the others wait."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from arriero.export.pipeline.ownership import own
from arriero.export.pipeline.sources import source_hash

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


@contextlib.contextmanager
def kept_kernels(cache: pytest.Cache, work: Path) -> Iterator[None]:
    """Within the block, a build whose work folder is `work` has TVM's kernels as an earlier run compiled them.

    Those of one version of the sources are compiled once, not once per run: half a minute of optimisation.
    """
    version = source_hash("export/compile/kernels", "export/compile/build_kernels.py")
    kept = cache.mkdir(f"tvm-kernels-{version[:12]}")
    own(work)
    with locked(kept):
        shutil.copytree(kept, work, dirs_exist_ok=True)
    yield
    with locked(kept):
        for stage in work.glob("kernels-*"):
            shutil.copytree(stage, kept / stage.name, dirs_exist_ok=True)
