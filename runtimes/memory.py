"""How much memory a process holds, and how much this one may still take of the machine or of its control groups."""

from __future__ import annotations

import re
from pathlib import Path

from arriero.runtimes.cgroup import cgroup_folders, read_text


def anonymous_memory(process: Path = Path("/proc/self")) -> int:
    """Bytes of a process that no file stands behind, by its folder in /proc; 0 where it has ended."""
    return status_bytes(process, "RssAnon")[0]


def status_bytes(process: Path, *fields: str) -> list[int]:
    """Sizes that /proc says of a process at one moment, in bytes; 0 for one that it does not say."""
    said = read_text(process / "status")
    found = [re.search(rf"^{field}:\s+(\d+) kB$", said, re.M) for field in fields]
    return [0 if match is None else int(match.group(1)) * 1024 for match in found]


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
