"""Bytes: read from text and shown to people, what this machine has free, and whether a build fits."""

from __future__ import annotations

import ctypes
import gc
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from arriero.errors import ArrieroError, MachineLacks
from arriero.runtimes.cgroup import read_text

UNITS = {"B": 1} | {
    f"{prefix}{infix}B": base**power
    for power, prefix in enumerate("KMGTP", 1)
    for infix, base in (("", 1000), ("i", 1024))
}
SMALLEST_BUDGET = 1 << 20


def parse_bytes(value: int | str) -> int:
    """Read a size: `8GiB` (2^30), `8 GB` (10^9), or a plain number of bytes. Raises `ArrieroError` without `where`."""
    remedy = "Write a number and a unit: B, KB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (powers of 1024)"
    units = {unit.lower(): factor for unit, factor in UNITS.items()}
    if isinstance(value, int) and not isinstance(value, bool):
        size: float = value
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
        unit = match.group(2).lower() if match else ""
        if isinstance(value, bool) or match is None or (unit and unit not in units):
            raise ArrieroError(f"{value!r} is not a size", expected="a size such as 8GiB", remedy=remedy)
        size = float(match.group(1)) * (units[unit] if unit else 1)
    if size < SMALLEST_BUDGET:
        what = f"{value} is less than {human_bytes(SMALLEST_BUDGET)}; is the unit missing?"
        raise ArrieroError(what, expected="a size such as 8GiB", remedy=remedy)
    return int(size)


def human_bytes(count: float) -> str:
    """Show bytes in the largest binary unit that leaves at least 1: 1536 -> `1.5 KiB`; three significant digits."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1023.5 or unit == "TiB":
            break
        count /= 1024
    if unit == "B" or abs(count) >= 100:
        return f"{count:,.0f} {unit}"
    return f"{count:.3g} {unit}"


def human_seconds(count: float) -> str:
    """Show a time in its two largest units: 3,725 -> `1 h 2 min`; below ten seconds with one digit."""
    if count < 10:
        return f"{count:.1f} s"
    minutes, seconds = divmod(round(count), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


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
