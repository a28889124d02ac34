"""Says which versions of which bundles a store holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from arriero.errors import ArrieroError
from arriero.export.store.layout import BUNDLES, NAME, find_version, read_version, versions
from arriero.export.store.objects import ObjectStore


@dataclass(frozen=True)
class StoredVersion:
    """A version of a bundle, or why it cannot be pulled; `latest`: it was pushed last."""

    name: str
    version: str
    latest: bool
    bytes: int = 0
    backend: str = ""
    profile: str = ""
    arch: str = ""
    proven: bool = False
    problem: str | None = None


def list_bundles(store: ObjectStore) -> list[StoredVersion]:
    """All versions of all bundles, by name, the latest first."""
    listed = []
    for name in filter(NAME.fullmatch, store.names(BUNDLES)):
        try:
            last = find_version(store, name, None)
        except ArrieroError:  # a first push is still under way
            last = ""
        described = [_describe(store, name, version, version == last) for version in versions(store, name)]
        listed += sorted(described, key=lambda one: (not one.latest, one.version))
    return listed


def _describe(store: ObjectStore, name: str, version: str, last: bool) -> StoredVersion:
    try:
        _, manifest = read_version(store, name, version, Path(name))
    except ArrieroError as error:
        return StoredVersion(name, version, last, problem=str(error))
    size, target = sum(record.bytes for record in manifest.files.values()), manifest.target
    return StoredVersion(name, version, last, size, target.backend, target.profile, target.arch, proven=manifest.proven)
