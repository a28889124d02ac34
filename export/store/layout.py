"""What lies where in a store, and what a bundle in it must be before any of it is taken.

    chunks/<sha256>                   a chunk of files, whichever bundles they belong to
    bundles/<name>/<sha256>.json      a version of a bundle: its manifest, named by its hash
    bundles/<name>/latest             the hash of the version that was pushed last

Nothing but `latest` is ever written over, and nothing is deleted.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from arriero.errors import ArrieroError, Problems
from arriero.export.store.objects import ObjectStore
from arriero.runtimes.integrity import check_chain
from arriero.runtimes.manifest import FILE, SHA256, FileRecord, Manifest
from arriero.strict_json import parse_json

BUNDLES, LATEST = "bundles", "latest"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
VERSION = re.compile(r"(?P<sha256>[0-9a-f]{64})\.json")
SHOWN = 12  # of a version's digits, where people read it
MOST_MANIFEST = 64 << 20  # bytes; that of a bundle of 400 GB has under 2 MiB
PUSH_AGAIN = "Push the bundle again"


@dataclass(frozen=True)
class Piece:
    """A chunk's place in a file of a bundle."""

    file: str
    offset: int
    bytes: int
    sha256: str


def pieces_of(name: str, record: FileRecord) -> list[Piece]:
    """The pieces of the file `name`, in their order."""
    return [Piece(name, *piece) for piece in record.pieces()]


def chunk(sha256: str) -> str:
    """The object that holds a chunk."""
    return f"chunks/{sha256}"


def latest(name: str) -> str:
    """The object that says which version of `name` was pushed last."""
    return f"{BUNDLES}/{name}/{LATEST}"


def version_object(name: str, version: str) -> str:
    """The object that holds the manifest of a version."""
    return f"{BUNDLES}/{name}/{version}.json"


def check_name(name: str) -> str:
    """`name`, if a bundle in a store can be called so. Raises ArrieroError otherwise."""
    if not NAME.fullmatch(name):
        raise ArrieroError(
            f"{name!r} cannot be a bundle's name in a store",
            expected="at most 64 letters, digits, dots, dashes and underscores, the first a letter or digit",
            remedy="Choose another with --name",
        )
    return name


def read_version(store: ObjectStore, name: str, version: str, folder: Path) -> tuple[bytes, Manifest]:
    """The manifest of a version as it was pushed, and what it says of the bundle that is to be `folder`.

    Raises ArrieroError for one that is not what its name says, or that is the manifest of no bundle.
    """
    where = store.place(version_object(name, version))
    content = store.read(version_object(name, version), MOST_MANIFEST)
    digest = hashlib.sha256(content).hexdigest()
    if digest != version:
        what = f"the manifest was changed or damaged: sha256 {digest[:SHOWN]}.."
        remedy = f"Delete it. {PUSH_AGAIN}"
        raise ArrieroError(what, where=where, expected=f"sha256 {version[:SHOWN]}..", remedy=remedy)
    raw = parse_json(content, where, PUSH_AGAIN)
    if not isinstance(raw, Mapping):
        raise ArrieroError("is not a JSON object", where=where, expected="a bundle's manifest", remedy=PUSH_AGAIN)
    manifest = Manifest.parse(raw, folder, where)
    check_files(manifest.files, where)
    try:
        check_chain(manifest)
    except ArrieroError as error:
        raise ArrieroError(error.what, where=where, remedy=PUSH_AGAIN) from None
    return content, manifest


def check_files(files: Mapping[str, FileRecord], where: str) -> None:
    """Refuse records of files that no build writes: names that are no plain paths, sizes and hashes that do not fit."""
    problems = []
    folders = {parent.as_posix() for name in files for parent in PurePosixPath(name).parents}
    for name, record in files.items():
        path = PurePosixPath(name)
        plain = name == path.as_posix() and ".." not in path.parts and not path.is_absolute() and name.isprintable()
        if not plain or name in folders or name == FILE:
            problems.append(ArrieroError(f"{name!r} is no file of a bundle", where=where, remedy=PUSH_AGAIN))
        elif flaw := record.flaw():
            what = f"the record of a file is wrong: {flaw}"
            problems.append(ArrieroError(what, where=f"{where}:files.{name}", remedy=PUSH_AGAIN))
    if problems:
        raise Problems(f"{where}: this is the manifest of no bundle", problems)


def find_version(store: ObjectStore, name: str, version: str | None) -> str:
    """The hash of the version of `name` that begins with `version`, or of the latest.

    Raises ArrieroError where there is none, or more than one.
    """
    if version is None:
        said = store.read(latest(name), 1 << 10).decode("utf-8", "replace").strip()
        if not SHA256.fullmatch(said):
            what, expected = f"says {said[:80]!r}", "the sha256 of a manifest"
            raise ArrieroError(what, where=store.place(latest(name)), expected=expected, remedy=PUSH_AGAIN)
        return said
    if SHA256.fullmatch(version):
        return version
    known = versions(store, name)
    matching = [one for one in known if one.startswith(version)]
    if len(matching) != 1:
        shown = ", ".join(one[:SHOWN] for one in matching or known) or "none"
        what = f"{len(matching)} versions of {name} begin with {version!r}"
        where, remedy = store.place(f"{BUNDLES}/{name}"), "Give more digits, or leave --version out for the latest"
        raise ArrieroError(what, where=where, expected=f"one of {shown}", remedy=remedy)
    return matching[0]


def versions(store: ObjectStore, name: str) -> list[str]:
    """The hashes of the versions of `name`."""
    matches = (VERSION.fullmatch(entry) for entry in store.names(f"{BUNDLES}/{name}"))
    return [match["sha256"] for match in matches if match]
