"""Bytes: read from text and shown to people, what this machine has free, and whether a build fits."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from arriero.errors import ArrieroError, MachineLacks

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
