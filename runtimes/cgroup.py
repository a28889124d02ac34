"""The control groups that bound this process on Linux, both versions: what a container may take of its machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """Give the folders of each group that `controller` ("memory", "cpu") bounds this process by, innermost first.

    `root` is where proc and sys are looked up; nothing is given on systems without them.
    """
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        mount = root / "sys/fs/cgroup"
        if controllers:  # version 1: a tree for each set of controllers
            if controller not in controllers.split(","):
                continue
            mount = mount / controller
        folder = mount / path.lstrip("/")
        # Inside a container the path is often the host's and not visible; the mount's root is then this group itself.
        for level in (folder, *folder.parents):
            yield level
            if level == mount:
                break


def cpu_quota(root: Path = Path("/")) -> float | None:
    """The processors' time that this process may take, in cores; None where no group limits it."""
    quotas = []
    for folder in cgroup_folders(root, "cpu"):
        asked = read_text(folder / "cpu.max").split() or [
            read_text(folder / name).strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        ]
        # "max" and -1 say "no limit"
        if len(asked) == 2 and asked[0].isdigit() and asked[1].isdigit() and int(asked[1]):
            quotas.append(int(asked[0]) / int(asked[1]))
    return min(quotas, default=None)


def read_text(path: Path) -> str:
    """Give what the file holds; nothing where it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
