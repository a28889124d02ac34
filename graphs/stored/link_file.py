"""One file in two places."""

from __future__ import annotations

import shutil
from pathlib import Path


def link_file(source: Path, target: Path) -> None:
    """Make the new file `target` the same as `source`: a hard link where the file system has one, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:
        copy_file(source, target)


def copy_file(source: Path, target: Path) -> None:
    """Make the new file `target` a copy of `source`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
