"""Parity of a bundle against a reference record: what a build does before publishing, and a device after.

Nothing here needs PyTorch, the checkpoint, or more than the runtime's own packages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from arriero.errors import ArrieroError
from arriero.export.proof.measure_bundle import Watch, measure_bundle
from arriero.runtimes.integrity import open_manifest
from arriero.runtimes.manifest import FILE, RECORD_FOLDER, REPORTS, Manifest, ProofTerms
from arriero.runtimes.proof.cases import Reference
from arriero.runtimes.proof.complete import complete_proof
from arriero.runtimes.proof.record import ReferenceRecord
from arriero.runtimes.proof.report import ParityReport, read_json
from arriero.runtimes.proof.rtn_baseline import recorded_rows
from arriero.thresholds import OVER_RTN


def prove_bundle(bundle: Path, folder: Path | None, watch: Watch, output: Path | None = None) -> ParityReport:
    """Measure a published bundle here, against its own record or that in `folder`, by the terms of its build.

    A bundle that its build had no machine for is proven by this: where it passes against its own record, the proof is
    written into it, or into `output`. Against another record the RTN baseline's KL stands as the build found it, and
    judges nothing. Raises ArrieroError for a record of another checkpoint, and where a bundle brings none.
    """
    manifest = open_manifest(bundle)
    record = open_record(manifest, folder)
    if record.hash != manifest.record:
        return measure_other_cases(manifest, record, record.labels(), watch)
    if manifest.proven and output is not None:
        remedy = "Leave out --output; --html, --junit and --json write what was measured"
        raise ArrieroError("the bundle is proven already", where=str(bundle), remedy=remedy)
    if output is not None:
        _check_output(output, manifest)
    report = measure_bundle(bundle, record, manifest.proof, record.labels(), watch)
    if not manifest.proven and not report.failed:
        complete_proof(manifest, report, output or bundle)
    return report


def _check_output(folder: Path, manifest: Manifest) -> None:
    """Refuse a folder with files that the proof would write over, unless they are an earlier proof of this bundle."""
    there = [name for name in (FILE, *REPORTS) if (folder / name).exists()]
    try:
        same = Manifest.read(folder).chain.record == manifest.chain.record
    except ArrieroError:
        same = False
    if there and not same:
        raise ArrieroError(
            f"holds {', '.join(there)}, which the proof would write over",
            where=str(folder),
            expected="an empty folder, or one with an earlier proof of this bundle",
            remedy="Give another folder",
        )


def other_terms(manifest: Manifest) -> ProofTerms:
    """The terms on other cases than the build's, which its RTN baseline was not measured on."""
    return ProofTerms({name: limit for name, limit in manifest.proof.thresholds.items() if name != OVER_RTN})


def measure_other_cases(
    manifest: Manifest, reference: Reference, labels: Mapping[str, str], watch: Watch
) -> ParityReport:
    """Measure a bundle on other cases than its build's, with the rows of the build's report that stand on its own.

    A bundle that is not proven yet has no such rows.
    """
    report = measure_bundle(manifest.bundle, reference, other_terms(manifest), labels, watch)
    built = recorded_rows(read_json(manifest.bundle / "parity.json")) if manifest.proven else ()
    return replace(report, rows=(*report.rows, *built))


def open_record(manifest: Manifest, folder: Path | None) -> ReferenceRecord:
    """The record of a bundle, or that in `folder`, which has to be of the bundle's checkpoint."""
    bundle = manifest.bundle
    if folder is None and not (bundle / RECORD_FOLDER).is_dir():
        raise ArrieroError(
            "the bundle does not bring its reference record",
            where=str(bundle),
            expected=f"the record {manifest.record[:12]}..., which its build published apart",
            remedy="Give its folder with --record, or the checkpoint with --against",
        )
    record = ReferenceRecord.open(folder or bundle / RECORD_FOLDER)
    checkpoint = manifest.chain.checkpoint
    if record.checkpoint != checkpoint:
        raise ArrieroError(
            "the reference record was not made from the bundle's checkpoint",
            where=str(record.folder),
            expected=f"a record of the checkpoint with hash {checkpoint[:12]}...",
            remedy="Give the record that was published with the bundle",
        )
    return record
