"""Whether the graphs and weights of an open bundle are still those that were there when it was opened.

The vision tower is opened at the first image, maybe hours later. Files of another build that lie at the same path by
then would be mixed with the graphs that run already.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from arriero.errors import ArrieroError
from arriero.runtimes.manifest import ADAPTERS, FILE, RECORD_FOLDER, REPORTS

# What a proof may write into a bundle while it is open.
NOT_RUN = (FILE, *REPORTS, RECORD_FOLDER, ADAPTERS)


class Unchanged:
    """What identified each file that runs, in a folder, when this was made."""

    def __init__(self, folder: Path) -> None:
        """Look at the files in `folder`; none is read."""
        self._folder = folder
        self._files = _identities(folder)

    def check(self) -> None:
        """Raise `ArrieroError` where a file was changed, replaced or taken away since."""
        now = _identities(self._folder)
        changed = sorted(name for name, identity in self._files.items() if now.get(name) != identity)
        if changed:
            raise ArrieroError(
                f"the bundle was changed or replaced while it was open: {', '.join(changed[:4])}",
                where=str(self._folder),
                expected="the files that were there when it was loaded",
                remedy="Load the bundle again",
            )


def _identities(folder: Path) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            inside = path.relative_to(folder)
            if inside.parts[0] in NOT_RUN:
                continue
            with suppress(OSError):  # gone between the two looks
                state = path.stat()
                found[str(inside)] = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
    return found
