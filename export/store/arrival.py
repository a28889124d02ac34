"""The files of a bundle as they arrive: linked or copied from bundles that are here, or fetched chunk by chunk."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from arriero.errors import ArrieroError, MachineLacks, Problems
from arriero.export.machine.budget import free_disk
from arriero.export.store.layout import PUSH_AGAIN, SHOWN, Piece, chunk, pieces_of
from arriero.export.store.objects import ObjectStore
from arriero.export.store.transfer import Watch, digest_of, in_order, read_part
from arriero.graphs.stored.link_file import copy_file, link_file
from arriero.runtimes.manifest import FileRecord, Manifest
from arriero.sizes import human_bytes


class Arrival:
    """The files of a bundle on their way into the folder `new`; `fetched`: the bytes that came out of the store."""

    def __init__(
        self,
        store: ObjectStore,
        files: Mapping[str, FileRecord],
        new: Path,
        copies: Sequence[Manifest],
        watch: Watch,
        step: str,
        copied: bool,
    ) -> None:
        """`copies` are bundles that are here. With `copied` none of their files is linked."""
        self.put = copy_file if copied else link_file
        self.store, self.files, self.new, self.watch, self.step = store, files, new, watch, step
        self.fetched = self._done = 0
        self._total = sum(record.bytes for record in files.values())
        held = [(bundle.bundle / name, record) for bundle in copies for name, record in bundle.files.items()]
        self._twins = {record: path for path, record in held}
        self._parts = {piece.sha256: (path, piece) for path, record in held for piece in pieces_of(path.name, record)}
        self._taken: set[str] = set()

    def take_twins(self) -> None:
        """Take the files that a local bundle has with the same content."""
        for name, record in self.files.items():
            twin, path = self._twins.get(record), self.new / name
            if twin is not None and _holds(twin, record):
                path.unlink(missing_ok=True)
                self.put(twin.resolve(), path)
                self._taken.add(name)
                self._count(record.bytes)

    def fetch(self) -> None:
        """Write the other files chunk by chunk, each from where it lies nearest. Raises all damage together."""
        files = {name: record for name, record in self.files.items() if name not in self._taken}
        self._prepare(files)
        problems: list[ArrieroError] = []
        parts = in_order(self._part, (piece for name, record in files.items() for piece in pieces_of(name, record)))
        with contextlib.closing(parts):
            for name, record in files.items():
                whole = hashlib.sha256()
                with (self.new / name).open("r+b") as file:
                    for piece in pieces_of(name, record):
                        part, fetched = next(parts)
                        if isinstance(part, ArrieroError):
                            problems.append(part)
                            continue
                        self.fetched += fetched
                        file.seek(piece.offset)
                        file.write(part)
                        whole.update(part)
                        self._count(piece.bytes)
                    file.flush()
                    os.fsync(file.fileno())
                if not problems and whole.hexdigest() != record.sha256:
                    what = f"its chunks make a file of sha256 {whole.hexdigest()[:SHOWN]}.."
                    expected = f"sha256 {record.sha256[:SHOWN]}.. that the manifest records"
                    problems.append(ArrieroError(what, where=name, expected=expected, remedy=PUSH_AGAIN))
        if problems:
            raise Problems(f"{self.store.place('')}: the store does not hold what the manifest says", problems)

    def _prepare(self, files: Mapping[str, FileRecord]) -> None:
        """Make the files that are to be written, as far as the disk has room for them."""
        missing = 0
        for name, record in files.items():
            path = self.new / name
            # a link from an earlier try is another bundle's file
            if path.is_file() and path.stat().st_nlink > 1:
                path.unlink()
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                if file.tell() > record.bytes:
                    file.truncate(record.bytes)
                missing += max(0, record.bytes - file.tell())
        if missing > (free := free_disk(self.new)):
            what = f"{human_bytes(free)} of disk space are free, {human_bytes(missing - free)} too little"
            remedy = "Free some and run the command again: what has arrived stays"
            raise MachineLacks(what, where=str(self.new), expected=human_bytes(missing), remedy=remedy)

    def _part(self, piece: Piece) -> tuple[bytes | ArrieroError, int]:
        """The bytes of a piece, and how many were fetched for it; an error where the store's are wrong.

        They are what an earlier try brought, a local bundle's, or the store's.
        """
        part = read_part(self.new / piece.file, piece.offset, piece.bytes)
        if digest_of(part) == piece.sha256:
            return part, 0
        if piece.sha256 in self._parts:
            path, local = self._parts[piece.sha256]
            with contextlib.suppress(OSError):
                part = read_part(path, local.offset, local.bytes)
                if digest_of(part) == piece.sha256:
                    return part, 0
        part = self.store.read(chunk(piece.sha256), piece.bytes)
        if (digest := digest_of(part)) == piece.sha256:
            return part, len(part)
        short = f"has {len(part)} bytes" if len(part) < piece.bytes else f"has sha256 {digest[:SHOWN]}.."
        error = ArrieroError(
            f"the chunk {short}: it was changed or damaged",
            where=self.store.place(chunk(piece.sha256)),
            expected=f"the {piece.bytes} bytes that it is named by",
            remedy="Delete it and push the bundle again, which sends what is missing",
        )
        return error, 0

    def _count(self, count: int) -> None:
        self._done += count
        self.watch(self.step, self._done, self._total, "bytes")


def _holds(path: Path, record: FileRecord) -> bool:
    try:
        return path.stat().st_size == record.bytes and record.damage(path) is None
    except OSError:
        return False
