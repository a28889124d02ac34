"""Which folders are ours to change and delete: those that hold our mark, written into them while they were empty.

A name proves nothing: users call folders what they like, dates look like hashes.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from arriero.errors import ArrieroError

MARK = ".arriero"
PARTIAL = ".partial"


def own(folder: Path) -> None:
    """Make `folder` and mark it, or take the one that is marked or empty. Raises ArrieroError for any other."""
    if is_owned(folder):
        return
    if not may_own(folder):
        raise in_the_way(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text(_mark(folder), encoding="utf-8")


def in_the_way(folder: Path) -> ArrieroError:
    """What is said of a folder that the build needs and may not `own`."""
    remedy = "Move it away, or choose another `output`"
    return ArrieroError("is in the way of the build, and no build made it", where=str(folder), remedy=remedy)


def may_own(folder: Path) -> bool:
    """Whether `own` takes `folder`: it is ours, not there, empty, or holds the beginning of our mark and nothing else,
    as a kill leaves it.
    """
    if is_owned(folder):
        return True
    if folder.is_symlink() or not folder.is_dir():
        return not (folder.is_symlink() or folder.exists())
    try:
        return all(entry.name == MARK and _begins_mark(entry) for entry in folder.iterdir())
    except OSError:  # a folder that we may not look into is somebody else's
        return False


def _begins_mark(file: Path) -> bool:
    return file.is_file() and _mark(file.parent).encode().startswith(file.read_bytes())


def is_owned(folder: Path) -> bool:
    """Whether `folder` holds our mark, made for a folder of its name."""
    try:
        return not folder.is_symlink() and (folder / MARK).read_text(encoding="utf-8") == _mark(folder)
    except (OSError, ValueError):
        return False


def remove_owned(folder: Path, first: str | None = None) -> None:
    """Delete a marked folder, `first` before all else and the mark last, so that a deletion cut short can be finished.

    An empty folder, which marking or deleting leaves when it is cut short, goes as well. Raises ArrieroError for any
    other without our mark; one that is not there is no error.
    """
    if not may_own(folder):
        raise ArrieroError("no build made it, so none deletes it", where=str(folder), remedy="Move it away")
    if not folder.exists():
        return
    if first is not None:
        (folder / first).unlink(missing_ok=True)
    for entry in folder.iterdir():
        if entry.name == MARK:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    (folder / MARK).unlink(missing_ok=True)
    folder.rmdir()


def _mark(folder: Path) -> str:
    """The mark names the folder, so that a copy under another name is not ours."""
    name = folder.name.removesuffix(PARTIAL)
    return f"6f0c27d1 {name}: made by `arriero build`, which deletes it with all that is in it\n"
