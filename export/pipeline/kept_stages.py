"""Stages that say nothing of a user's weights, kept in the user's cache folder for builds into other output folders.

Graphs depend on a model's shape and the compiled kernels on our sources: whoever builds a second checkpoint, or a
second time elsewhere, need not wait for them again. What is kept is a finished stage, its record and its hashes, under
the same name and key; it is believed only while every file has its hash.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from arriero.errors import ArrieroError
from arriero.export.pipeline.ownership import MARK, PARTIAL, is_owned, own, remove_owned
from arriero.runtimes.user_cache import user_cache

ROOM = 1 << 30  # bytes; the least recently used goes first


class KeptStages:
    """Finished stages in `<cache>/stages/<name>-<key>`. A cache that cannot be read or written is none."""

    def __init__(self, cache: Path | None) -> None:
        self.root = None if cache is None else cache / "stages"

    @classmethod
    def of_user(cls) -> KeptStages:
        """Those of the user who runs this process."""
        return cls(user_cache())

    def holds(self, name: str, key: str) -> bool:
        """Whether the stage is kept, be it intact or not."""
        return self.root is not None and is_owned(self.root / f"{name}-{key}")

    def lend(self, name: str, key: str, into: Path) -> bool:
        """Copy what is kept of the stage into the folder `into`; whether all of it could be read."""
        assert self.root is not None
        kept = self.root / f"{name}-{key}"
        try:
            _copy(kept, into)
            os.utime(kept)
        except OSError:  # another build made room, or the disk is at fault
            return False
        return True

    def keep(self, folder: Path) -> None:
        """Keep a copy of the finished stage `folder` in the place of what is kept under its name."""
        if self.root is None:
            return
        kept = self.root / folder.name
        partial = kept.with_name(f"{kept.name}{PARTIAL}")
        # Two builds that keep one stage at once can spoil it for each other: then it is not intact, and made again.
        with suppress(OSError, ArrieroError):
            remove_owned(partial)
            own(partial)
            _copy(folder, partial)
            remove_owned(kept)
            partial.rename(kept)
            self._make_room()

    def _make_room(self) -> None:
        assert self.root is not None
        kept = sorted((folder for folder in self.root.iterdir() if is_owned(folder)), key=lambda at: at.stat().st_mtime)
        sizes = [sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) for folder in kept]
        excess = sum(sizes) - ROOM
        for folder, size in zip(kept, sizes, strict=True):
            if excess <= 0:
                return
            remove_owned(folder)
            excess -= size


def _copy(stage: Path, into: Path) -> None:
    shutil.copytree(stage, into, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MARK))
