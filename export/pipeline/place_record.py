"""Where a build's reference record goes: into each bundle, or beside the bundles under a name of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from arriero.export.pipeline.bundle import assemble
from arriero.export.pipeline.stages import WorkDir
from arriero.runtimes.manifest import RECORD_FILE, RECORD_FOLDER, FileRecord, Manifest, file_sha256, proof_path
from arriero.runtimes.proof.record import FILE, ReferenceRecord

Place = Literal["bundle", "separate"]


def place_record(
    record: ReferenceRecord, adapter: str | None, place: Place, bundle: Path, work: WorkDir
) -> dict[str, FileRecord]:
    """Put the record into the `bundle` that is being assembled, or publish it beside the bundles, once.

    It is that of the model with `adapter`, or of the model itself.

    Gives what its stage recorded of each file that is in the bundle now, by its path there.
    """
    if place == "bundle":
        inside = proof_path(adapter, RECORD_FOLDER)
        files = assemble(record.folder, bundle / inside)
        return {f"{inside}/{name}": recorded for name, recorded in files.items()}
    folder = separate_folder(work.output, record.hash)
    if not _holds(folder, record.hash):
        assemble(record.folder, work.bundles.prepare(folder))
        work.bundles.publish(folder)
    return {}


def is_placed(bundle: Path, place: Place) -> bool:
    """Whether the records of a published bundle are where the build file wants them."""
    manifest = Manifest.read(bundle)
    inside = [proof_path(adapter, RECORD_FILE) in manifest.files for adapter in manifest.records]
    if place == "bundle":
        return all(inside)
    apart = (_holds(separate_folder(bundle.parent, record), record) for record in manifest.records.values())
    return not any(inside) and all(apart)


def _holds(folder: Path, digest: str) -> bool:
    """Whether the folder holds the record of this hash."""
    path = folder / FILE
    return path.is_file() and file_sha256(path) == digest


def separate_folder(output: Path, digest: str) -> Path:
    """The folder of a record that is published apart."""
    return output / f"reference-{digest[:8]}"
