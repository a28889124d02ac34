"""Whether what a folder names lies in it: paths that climb out and links that lead out are not its own files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def climbs_out(name: str) -> bool:
    """Whether the path `name` points outside the folder that it is relative to."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts


def leads_out(path: Path, folder: Path) -> bool:
    """Whether `path`, its links followed, lies outside `folder`; links that go in a circle lead nowhere in it."""
    try:
        return not path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # the second is what Python 3.11 says of a circle
        return True


def links_out(folder: Path) -> Iterator[str]:
    """The paths within `folder` of links, to files or to folders, that lead out of it."""
    root = folder.resolve()
    for place, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(place, name)
            if path.is_symlink() and leads_out(path, root):
                yield path.relative_to(root).as_posix()
