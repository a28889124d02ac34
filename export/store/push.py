"""Pushes a bundle into a store: the chunks that it lacks, then the manifest, then the word that this is the latest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from arriero.errors import ArrieroError, Problems
from arriero.export.store.layout import (
    SHOWN,
    Piece,
    check_files,
    check_name,
    chunk,
    latest,
    pieces_of,
    version_object,
)
from arriero.export.store.objects import ObjectStore
from arriero.export.store.transfer import Watch, digest_of, in_order, read_part
from arriero.runtimes.integrity import open_manifest
from arriero.runtimes.manifest import COPY_AGAIN, FILE


@dataclass(frozen=True)
class Pushed:
    """A version in a store, and what it took to bring it there."""

    name: str
    version: str
    bytes: int
    chunks: int
    sent_bytes: int
    sent_chunks: int


def push_bundle(bundle: Path, store: ObjectStore, watch: Watch, name: str | None = None) -> Pushed:
    """Make `bundle` the latest version of `name` (that of its folder) in `store`.

    A chunk that is there with its size stays, so a push that was cut short goes on where it stopped. Raises
    ArrieroError/Problems for a bundle that is not what its manifest says, before any version names it.
    """
    name = check_name(bundle.absolute().name if name is None else name)
    manifest, content = open_manifest(bundle, full=False), (bundle / FILE).read_bytes()
    check_files(manifest.files, str(bundle / FILE))
    pieces = [piece for file, record in manifest.files.items() for piece in pieces_of(file, record)]
    distinct = list({piece.sha256: piece for piece in pieces}.values())
    problems: list[ArrieroError] = []

    def send(piece: Piece) -> int | ArrieroError:
        """The bytes that were sent of a piece, or what is wrong with it."""
        if store.size(chunk(piece.sha256)) == piece.bytes:
            return 0
        part = read_part(bundle / piece.file, piece.offset, piece.bytes)
        if digest_of(part) != piece.sha256:
            what = f"the file's content was changed or damaged, from byte {piece.offset} on"
            expected = f"sha256 {piece.sha256[:SHOWN]}.. that {FILE} records"
            return ArrieroError(what, where=piece.file, expected=expected, remedy=COPY_AGAIN)
        if not problems:
            store.write(chunk(piece.sha256), part)
        return piece.bytes

    done, total, sent = 0, sum(piece.bytes for piece in distinct), []
    for piece, outcome in zip(distinct, in_order(send, distinct), strict=True):
        if isinstance(outcome, ArrieroError):
            problems.append(outcome)
        elif outcome:
            sent.append(outcome)
        done += piece.bytes
        watch(f"push {name}", done, total, "bytes")
    if problems:
        raise Problems(f"{bundle}: the bundle's files do not match its manifest", problems)
    version = digest_of(content)
    if store.size(version_object(name, version)) != len(content):
        store.write(version_object(name, version), content)
    store.write(latest(name), f"{version}\n".encode())
    size = sum(record.bytes for record in manifest.files.values())
    return Pushed(name, version, size, len(distinct), sum(sent), len(sent))
