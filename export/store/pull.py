"""Pulls a version of a bundle out of a store: what local bundles have of it stays here, the rest is fetched.

It is put together in `<folder>.pulling`, where a pull that was cut short goes on, and gets its name by a rename.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from arriero.errors import ArrieroError, raise_together
from arriero.export.pipeline.ownership import is_owned, own
from arriero.export.pipeline.publish import Publisher
from arriero.export.store.arrival import Arrival
from arriero.export.store.layout import check_name, find_version, read_version
from arriero.export.store.objects import ObjectStore
from arriero.export.store.transfer import Watch
from arriero.runtimes.integrity import open_manifest
from arriero.runtimes.manifest import FILE, FileRecord, Manifest
from arriero.traits import TRAITS

PULLING = ".pulling"
LOCK = "lock"


@dataclass(frozen=True)
class Pulled:
    """A version that is in its folder, and what it took: `current` where it was there already."""

    name: str
    version: str
    bytes: int
    fetched_bytes: int = 0
    current: bool = False


def pull_bundle(
    store: ObjectStore,
    folder: Path,
    watch: Watch,
    name: str | None = None,
    version: str | None = None,
    over: Sequence[Path] = (),
    verify: bool = False,
) -> Pulled:
    """Make `folder` the `version` (first digits; the latest for None) of `name` (that of the folder) in `store`.

    Chunks that the bundle in `folder` or those in `over` hold are not fetched. A bundle that is there already stays,
    hashed whole first if `verify`. Raises ArrieroError/Problems for what is not as the store says; nothing of it
    appears in `folder` then.
    """
    folder = folder.absolute()
    name = check_name(folder.name if name is None else name)
    version = find_version(store, name, version)
    content, manifest = read_version(store, name, version, folder)
    copies = [Manifest.read(bundle) for bundle in over]
    size = sum(record.bytes for record in manifest.files.values())
    publisher = Publisher(folder.parent, suffix=PULLING)
    raise_together(publisher.problems(folder), "a bundle cannot be pulled")
    if is_owned(publisher.staging(folder)):
        with _alone(publisher, folder):
            publisher.recover_one(folder)
    if _is_there(manifest, content, verify):
        return Pulled(name, version, size, current=True)
    with _alone(publisher, folder):
        new = publisher.prepare(folder, resumes=True)
        _drop_others(new, manifest.files)
        with contextlib.suppress(ArrieroError):  # a bundle that is damaged so has nothing to give
            copies.append(Manifest.read(folder))
        traits = TRAITS.get(manifest.target.backend)  # None for a later version's
        copied = traits is not None and traits.is_onnx
        arrival = Arrival(store, manifest.files, new, copies, watch, f"pull {name}", copied)
        arrival.take_twins()
        arrival.fetch()
        (new / FILE).write_bytes(content)
        open_manifest(new, full=False)
        publisher.publish(folder)
    return Pulled(name, version, size, arrival.fetched)


def _is_there(manifest: Manifest, content: bytes, verify: bool) -> bool:
    """Whether the bundle is in its folder, maybe with a proof of the machine's own that the stored one lacks."""
    try:
        held = open_manifest(manifest.bundle, full=True if verify else None)
    except ArrieroError:
        return False
    proven_here = held.digest == manifest.digest and held.proven and not manifest.proven
    return proven_here or (manifest.bundle / FILE).read_bytes() == content


@contextlib.contextmanager
def _alone(publisher: Publisher, folder: Path) -> Iterator[None]:
    """Hold what is to be `folder` for one pull. The system frees the lock of a killed process."""
    staging = publisher.staging(folder)
    own(staging)
    with (staging / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            what, remedy = "another pull is at work on this folder", "Wait until it ends"
            raise ArrieroError(what, where=str(folder), expected="one pull at a time", remedy=remedy) from None
        yield


def _drop_others(new: Path, names: Mapping[str, FileRecord]) -> None:
    """Delete what an earlier try at another version left."""
    for path in sorted(new.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):  # it holds something
                path.rmdir()
        elif path.relative_to(new).as_posix() not in names:
            path.unlink()
