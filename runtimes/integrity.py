"""Whether a bundle is what its manifest says: the chain of hashes, and every file's size and content.

Nothing here asks what machine this is: a bundle for another one is checked, inspected and compared like any other.
"""

from __future__ import annotations

from pathlib import Path

from arriero.errors import ArrieroError, Problems
from arriero.runtimes.inside import links_out
from arriero.runtimes.manifest import (
    COPY_AGAIN,
    FILE,
    RECORD_FILE,
    Manifest,
    link,
    parity_digest,
    proof_path,
)

FULL_HASH_BYTES = 1 << 30  # bundles up to here are hashed whole at every load: about a second
QUICK_HASH_BYTES = 64 << 20  # in larger bundles, only files up to here are, and those of code
CODE = {".so", ".engine", ".plan"}  # suffixes of what runs once it is opened: libraries, and what TensorRT deserialises


def open_manifest(bundle: Path, full: bool | None = None) -> Manifest:
    """Read a bundle's manifest and check that the bundle is what it says (`full` as in `check_files`)."""
    manifest = Manifest.read(bundle)
    check_chain(manifest)
    check_files(manifest, full)
    return manifest


def check_chain(manifest: Manifest) -> None:
    """Refuse a manifest that was edited, or put together from those of several builds."""
    chain = manifest.chain
    # The profile's own digest is not recorded; its link is held by the one after it.
    for before, name, digest, what in (
        ("checkpoint", "graph", manifest.build.get("graph"), "the graphs are not those of this checkpoint"),
        ("profile", "artifact", manifest.digest, "the manifest or its file records were changed"),
        ("artifact", "record", manifest.record, "the reference record is not that of this bundle"),
        ("record", "parity", parity_digest(manifest.files), "the parity report is not that of this bundle"),
    ):
        if getattr(chain, name) != link(getattr(chain, before), str(digest)):
            where = f"{manifest.bundle / FILE}:chain.{name}"
            raise ArrieroError(f"the link {before} -> {name} is broken: {what}", where=where, remedy=COPY_AGAIN)
    for adapter, record in manifest.records.items():
        file = manifest.files.get(proof_path(adapter, RECORD_FILE))
        if file is not None and file.sha256 != record:
            where = f"{manifest.bundle / FILE}:{'record' if adapter is None else f'adapters.{adapter}.record'}"
            raise ArrieroError("another reference record is in the bundle", where=where, remedy=COPY_AGAIN)


def check_proven(manifest: Manifest) -> None:
    """Refuse a bundle that was not proven against its reference: the machine that built it could not run it."""
    if not manifest.proven and manifest.bundle.parent.name.endswith(".partial"):
        raise ArrieroError(
            "the bundle is not proven: its build did not finish",
            where=str(manifest.bundle),
            remedy="Run `arriero build` again and take the bundle that it publishes",
        )
    if not manifest.proven:
        raise ArrieroError(
            "the bundle is not proven: the machine that built it could not run it",
            where=str(manifest.bundle),
            expected="a parity report that it passed",
            remedy=f"Run `arriero parity {manifest.bundle}` here, which measures it and completes the proof; "
            "`arriero.load(.., allow_unproven=True)` runs it without one",
        )


def check_files(manifest: Manifest, full: bool | None = None) -> None:
    """Compare the files with their records; all differences are raised together.

    Sizes are always compared. Hashes, for a large file those of its chunks, are compared for all files when `full`, or
    when `full` is None and the bundle has at most `FULL_HASH_BYTES`; otherwise for what is code (`CODE`) and files of
    at most `QUICK_HASH_BYTES`. A link that leads out of the bundle is refused before anything is read.
    """
    if full is None:
        full = sum(record.bytes for record in manifest.files.values()) <= FULL_HASH_BYTES
    problems = [
        ArrieroError(
            "the link leads out of the bundle",
            where=name,
            expected="files of the bundle itself",
            remedy=f"Copy what it points to in its place (`cp -rL`). {COPY_AGAIN}",
        )
        for name in links_out(manifest.bundle)
    ]
    if problems:  # nothing out there is read
        raise Problems(f"{manifest.bundle}: the bundle is not whole by itself", problems)
    for name, record in manifest.files.items():
        path = manifest.bundle / name
        if not path.is_file():
            problems.append(ArrieroError("the file is missing from the bundle", where=name, remedy=COPY_AGAIN))
        elif (size := path.stat().st_size) != record.bytes:
            what = f"the file has {size} bytes: it is incomplete or belongs to another build"
            expected = f"the {record.bytes} bytes that {FILE} records"
            problems.append(ArrieroError(what, where=name, expected=expected, remedy=COPY_AGAIN))
        elif (full or size <= QUICK_HASH_BYTES or CODE & {*path.suffixes}) and (damage := record.damage(path)):
            what = f"the file's content was changed or damaged: {damage}"
            expected = f"sha256 {record.sha256[:12]}.. that {FILE} records"
            problems.append(ArrieroError(what, where=name, expected=expected, remedy=COPY_AGAIN))
    if problems:
        raise Problems(f"{manifest.bundle}: the bundle's files do not match its manifest", problems)
