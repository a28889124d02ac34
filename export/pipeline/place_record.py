"""Where a build's reference record goes: into each bundle, or beside the bundles under a name of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from arriero.export.pipeline.bundle import assemble
from arriero.export.pipeline.stages import WorkDir
from arriero.runtimes.manifest import RECORD_FILE, RECORD_FOLDER, FileRecord, Manifest, file_sha256
from arriero.runtimes.proof.record import FILE, ReferenceRecord

Place = Literal["bundle", "separate"]


def place_record(record: ReferenceRecord, place: Place, bundle: Path, work: WorkDir) -> dict[str, FileRecord]:
    """Put the record into the `bundle` that is being assembled, or publish it beside the bundles, once.

    Gives what its stage recorded of each file that is in the bundle now, by its path there.
    """
    if place == "bundle":
        files = assemble(record.folder, bundle / RECORD_FOLDER)
        return {f"{RECORD_FOLDER}/{name}": recorded for name, recorded in files.items()}
    folder = separate_folder(work.output, record.hash)
    if not _holds(folder, record.hash):
        assemble(record.folder, work.bundles.prepare(folder))
        work.bundles.publish(folder)
    return {}


def is_placed(bundle: Path, place: Place) -> bool:
    """Whether the record of a published bundle is where the build file wants it."""
    manifest = Manifest.read(bundle)
    if place == "bundle":
        return RECORD_FILE in manifest.files
    separate = separate_folder(bundle.parent, manifest.record)
    return RECORD_FILE not in manifest.files and _holds(separate, manifest.record)


def _holds(folder: Path, digest: str) -> bool:
    """Whether the folder holds the record of this hash."""
    path = folder / FILE
    return path.is_file() and file_sha256(path) == digest


def separate_folder(output: Path, digest: str) -> Path:
    """The folder of a record that is published apart."""
    return output / f"reference-{digest[:8]}"
