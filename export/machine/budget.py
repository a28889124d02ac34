"""Bytes: what this machine has free, and whether a build fits."""

from __future__ import annotations

import ctypes
import gc
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from arriero.errors import ArrieroError, MachineLacks
from arriero.runtimes.cgroup import cgroup_folders, read_text
from arriero.sizes import human_bytes


def human_seconds(count: float) -> str:
    """Show a time in its two largest units: 3,725 -> `1 h 2 min`; below ten seconds with one digit."""
    if count < 10:
        return f"{count:.1f} s"
    minutes, seconds = divmod(round(count), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes this process may still take: the kernel's MemAvailable, or less where a cgroup limits it (v1 and v2).

    `root` is where proc and sys are looked up. None on systems without them.
    """
    limits = [_meminfo(root, "MemAvailable"), *_cgroup_headroom(root)]
    return min((size for size in limits if size is not None), default=None)


def total_memory(root: Path = Path("/")) -> int | None:
    """Bytes this machine or its cgroup has at all, or None where that is not known."""
    limits = [limit for limit, _ in _cgroup_limits(root)]
    return min((size for size in (_meminfo(root, "MemTotal"), *limits) if size is not None), default=None)


def free_disk(folder: Path) -> int:
    """Bytes a user may still write under `folder`, which need not exist yet."""
    for parent in (folder.absolute(), *folder.absolute().parents):
        if parent.exists():
            return shutil.disk_usage(parent).free
    raise FileNotFoundError(folder)


def check_budget(
    what: str, needed: int, *, budget: int | None, available: int | None, where: str, place: str = "this machine"
) -> None:
    """Refuse a build that needs more `what` ("memory", "disk space") than the build file or the machine gives it.

    `budget` is what the build file allows (None: no limit), named by `where`; `available` is what `place` has
    (None: not known).
    """
    if budget is not None and needed > budget:
        raise ArrieroError(
            f"the build needs about {human_bytes(needed)} of {what}, {human_bytes(needed - budget)} more than allowed",
            where=where,
            expected=f"at most {human_bytes(budget)}",
            remedy=f"Raise {where.rpartition(' ')[2]}, or choose a smaller profile, context or batch",
        )
    if available is not None and needed > available:
        raise MachineLacks(
            f"{place} has {human_bytes(available)} of {what} free, {human_bytes(needed - available)} too little",
            expected=f"about {human_bytes(needed)}",
            remedy=f"Free some {what}, build on a larger machine, or choose a smaller profile, context or batch",
        )


class PeakMemory:
    """Measures the peak memory of what runs inside `with`: `anonymous` (sampled RssAnon) and `resident` (VmHWM), bytes.

    Mapped weight files count in `resident`, never in `anonymous`; the kernel takes them back when memory is short.
    `anonymous` counts the programs that this one runs, compilers for instance, too. `resident` is the peak since the
    process began, because the kernel keeps one mark only.
    """

    def __init__(self, interval: float = 0.02) -> None:
        self.anonymous = self.resident = 0
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self._sample()

    def _sample(self) -> None:
        own = _status(Path("/proc/self"))
        # a child that has not become another program yet shares this one's memory
        name = read_text(Path("/proc/self/cmdline"))
        programs = (folder for folder in _descendants(Path("/proc/self")) if read_text(folder / "cmdline") != name)
        children = sum(_status(folder).get("RssAnon", 0) for folder in programs)
        self.anonymous = max(self.anonymous, own.get("RssAnon", 0) + children)
        self.resident = max(self.resident, own.get("VmHWM", 0))


def release_memory() -> None:
    """Give memory that is no longer used back to the system: what follows is not to pay for what went before."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)


def _status(folder: Path) -> dict[str, int]:
    """RssAnon and VmHWM of a process in bytes; nothing where it has ended."""
    found = re.findall(r"^(RssAnon|VmHWM):\s+(\d+) kB$", read_text(folder / "status"), re.M)
    return {key: int(kib) * 1024 for key, kib in found}


def _descendants(folder: Path) -> Iterator[Path]:
    """The processes that a process started, and those that they did."""
    for task in folder.glob("task/*/children"):
        for child in read_text(task).split():
            yield Path("/proc") / child
            yield from _descendants(Path("/proc") / child)


def _meminfo(root: Path, key: str) -> int | None:
    match = re.search(rf"^{key}:\s+(\d+) kB$", read_text(root / "proc/meminfo"), re.M)
    return int(match.group(1)) * 1024 if match else None


def _cgroup_headroom(root: Path) -> list[int]:
    """Limit minus usage per level; file pages that the kernel would drop first do not count as used."""
    headroom = []
    for limit, folder in _cgroup_limits(root):
        usage = read_text(folder / "memory.current") or read_text(folder / "memory.usage_in_bytes") or "0"
        droppable = re.search(r"^(?:total_)?inactive_file (\d+)$", read_text(folder / "memory.stat"), re.M)
        headroom.append(max(0, limit - int(usage) + (int(droppable.group(1)) if droppable else 0)))
    return headroom


def _cgroup_limits(root: Path) -> list[tuple[int, Path]]:
    """Each memory limit that holds for this process, with the cgroup folder that sets it."""
    limits = []
    for folder in cgroup_folders(root, "memory"):
        for file in ("memory.max", "memory.limit_in_bytes"):
            text = read_text(folder / file).strip()
            # v1 says "no limit" with a number near 2^63.
            if text.isdigit() and int(text) < 1 << 60:
                limits.append((int(text), folder))
    return limits
