"""A control group of Linux whose memory is bounded, page cache included, for what runs in it; needs root."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from arriero.errors import MachineLacks

ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryGroup:
    """The group in `folder`; `peak_file` holds the most bytes that its processes and their cached pages took."""

    folder: Path
    peak_file: str

    def enter(self) -> None:
        """Move the calling process into it, as `preexec_fn` of one that is started."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    @property
    def peak(self) -> int:
        """The most bytes so far."""
        return int((self.folder / self.peak_file).read_text())


@contextmanager
def memory_group(nbytes: int) -> Iterator[MemoryGroup]:
    """Give a group bounded to `nbytes`, and remove it afterwards. Raises MachineLacks where none can be made."""
    first = (ROOT / "memory").is_dir()  # version 1 has a tree for each controller
    folder = (ROOT / "memory" if first else ROOT) / f"arriero-{os.getpid()}"
    limit, peak = ("memory.limit_in_bytes", "memory.max_usage_in_bytes") if first else ("memory.max", "memory.peak")
    try:
        folder.mkdir()
        (folder / limit).write_text(str(nbytes))
    except OSError as error:
        raise MachineLacks(
            f"no control group of bounded memory can be made ({error.strerror})",
            where=str(folder),
            remedy="Run as root on Linux, with the memory controller on",
        ) from error
    try:
        yield MemoryGroup(folder, peak)
    finally:
        folder.rmdir()
