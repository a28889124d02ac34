"""What an unfinished stage has finished, piece by piece, with the hashes of its bytes: a resumed one uses nothing else.

A line of `kept.jsonl` is sealed and holds JSON: a piece's name, the regions of the folder's files that hold it, and a
note; or its name alone for one that is no longer kept. A torn or changed line says nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arriero.profiles.sealed_line import opened, sealed

FILE = "kept.jsonl"
CHUNK = 1 << 20  # bytes that are hashed at a time
Tell = Callable[[str], None]


def keep_silent(sentence: str) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Region:
    """Bytes of a file of the folder, and their sha256."""

    file: str
    offset: int
    bytes: int
    sha256: str

    @classmethod
    def holding(cls, file: str, offset: int, content: NDArray) -> Region:
        """The region of `file` that `content` was written to."""
        return cls(file, offset, content.nbytes, hashlib.sha256(np.ascontiguousarray(content).data).hexdigest())

    @classmethod
    def whole(cls, folder: Path, file: str) -> Region:
        """All of a file, read now."""
        size = (folder / file).stat().st_size
        return cls(file, 0, size, _sha256(folder / file, 0, size))

    def is_sound(self, folder: Path) -> bool:
        """Whether the file has these bytes there."""
        try:
            return _sha256(folder / self.file, self.offset, self.bytes) == self.sha256
        except OSError:
            return False


@dataclass(frozen=True)
class Entry:
    """Where a piece lies, and what was noted of it (a JSON value)."""

    regions: tuple[Region, ...]
    note: Any = None


class Journal:
    """The pieces that are kept in `folder` for a resume; `tell` is given a sentence for each that has to be made again.

    One process at a time writes into a folder.
    """

    def __init__(self, folder: Path, tell: Tell = keep_silent) -> None:
        self.folder, self.tell = folder, tell
        self._entries: dict[str, Entry] = {}
        for data in _lines(folder / FILE):
            if len(data) == 1:
                self._entries.pop(data[0], None)
            else:
                piece, regions, note = data
                self._entries[piece] = Entry(tuple(Region(*region) for region in regions), note)

    @property
    def entries(self) -> Mapping[str, Entry]:
        """What was kept, by piece; `holds` says whether it still is what it was."""
        return self._entries

    def keep(self, piece: str, *regions: Region, note: Any = None) -> None:
        """Note that `piece` lies in `regions`, whole; the last word on a piece counts."""
        self._entries[piece] = Entry(regions, note)
        self._append([piece, [astuple(region) for region in regions], note])

    def holds(self, piece: str) -> bool:
        """Whether `piece` was kept and has the bytes that it had; one that was changed is told, and kept no longer."""
        entry = self._entries.get(piece)
        if entry is None:
            return False
        changed = next((one for one in entry.regions if not one.is_sound(self.folder)), None)
        if changed is None:
            return True
        self.tell(
            f"{self.folder / changed.file}: {piece}, which an unfinished run left, is not what was written; "
            "it is made again"
        )
        self.forget(piece)
        return False

    def forget(self, piece: str) -> None:
        """Keep `piece` no longer: its bytes may change."""
        if self._entries.pop(piece, None) is not None:
            self._append([piece])

    def _append(self, data: list[Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(data).encode()
        with (self.folder / FILE).open("a+b") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            torn = file.read(1) not in (b"", b"\n")
            file.write(b"\n" * torn + sealed(text) + b"\n")


def _lines(path: Path) -> Iterator[list[Any]]:
    """The lines that are as they were written."""
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        if (text := opened(line)) is not None:
            yield json.loads(text)


def _sha256(path: Path, offset: int, count: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(offset)
        while count and (chunk := file.read(min(CHUNK, count))):
            digest.update(chunk)
            count -= len(chunk)
    return digest.hexdigest()
