"""A compiled library as a session of its own: the very bytes that were checked, mapped apart from every other.

The system gives back what it has mapped when it is asked for a path again, whatever lies there by now. So a library is
copied into memory of this process and opened there, under a name that never comes back: a bundle replaced at its path
answers with its new code, a session that is open keeps its own, and what is hashed is what runs.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from arriero.errors import ArrieroError
from arriero.runtimes.manifest import COPY_AGAIN

Library = TypeVar("Library")

_numbers = itertools.count(1)


class PrivateLibrary:
    """The library at `path` as it was when this was made; `open` may come much later."""

    def __init__(self, path: Path, sha256: str | None) -> None:
        """Read the library and remember its hash; `sha256` is the one that it must have, if any is known.

        Raises `ArrieroError` for another content, OSError where it cannot be read.
        """
        self.path = path
        self._sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        if sha256 is not None and self._sha256 != sha256:
            raise self._changed(sha256)

    def open(self, load: Callable[[str], Library]) -> Library:
        """Give what `load` makes of a path to a private copy. Raises `ArrieroError` where the file changed."""
        content = self.path.read_bytes()
        if hashlib.sha256(content).hexdigest() != self._sha256:
            raise self._changed(self._sha256)
        copy = os.memfd_create(self.path.name)
        try:
            with open(copy, "wb", closefd=False) as file:
                file.write(content)
            # the number may be that of an earlier copy, which the system would then take this for: the way there, of
            # steps that lead nowhere, is another each time
            steps = f"{next(_numbers):b}".replace("0", "/").replace("1", "./")
            return load(f"/proc/self/fd/{steps}{copy}")
        finally:
            os.close(copy)

    def _changed(self, expected: str) -> ArrieroError:
        return ArrieroError(
            "the library is another one than was checked: its bundle was changed or replaced meanwhile",
            where=str(self.path),
            expected=f"sha256 {expected[:12]}..",
            remedy=f"Load the bundle again. {COPY_AGAIN}",
        )
