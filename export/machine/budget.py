"""Bytes: what this machine has free, and whether a build fits."""

from __future__ import annotations

import shutil
from pathlib import Path

from arriero.errors import ArrieroError, MachineLacks
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
