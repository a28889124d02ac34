"""Parity of a bundle against a reference record: what a build does before publishing, and a device after.

Nothing here needs PyTorch, the checkpoint, or more than the runtime's own packages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from arriero.errors import ArrieroError
from arriero.export.proof.measure_bundle import Watch, measure_bundle, open_exact, own_terms
from arriero.runtimes.integrity import open_manifest
from arriero.runtimes.manifest import FILE, RECORD_FOLDER, REPORTS, Manifest, ProofTerms, proof_path
from arriero.runtimes.proof.cases import Reference
from arriero.runtimes.proof.complete import complete_proof
from arriero.runtimes.proof.record import ReferenceRecord
from arriero.runtimes.proof.report import ParityReport, read_json
from arriero.runtimes.proof.rows import Row
from arriero.runtimes.proof.rtn_baseline import recorded_rows
from arriero.runtimes.session import Session

Proofs = dict[str | None, ParityReport]  # of a bundle's model itself, None, and with each of its adapters


def prove_bundle(
    bundle: Path,
    folders: Sequence[Path],
    watch: Watch,
    output: Path | None = None,
    forced_routing: bool = False,
    exact: Path | None = None,
) -> Proofs:
    """Measure a published bundle here, against its own records or those in `folders`, by the terms of its build.

    With `forced_routing` it runs with the reference's routing too, whatever its build asked for, and the bundle `exact`
    runs with its routing (see `runtimes/proof/given_routing.py`).
    A bundle that its build had no machine for is proven by this: where it passes against its own records, the proof is
    written into it, or into `output`. Against another record the RTN baseline's KL stands as the build found it, and
    judges nothing. Raises ArrieroError for a record of another checkpoint, and where a bundle brings none.
    """
    manifest = open_manifest(bundle)
    records = open_records(manifest, folders)
    own_cases = {adapter: record.hash for adapter, record in records.items()} == manifest.records
    if own_cases and manifest.proven and output is not None:
        remedy = "Leave out --output; --html, --junit and --json write what was measured"
        raise ArrieroError("the bundle is proven already", where=str(bundle), remedy=remedy)
    if own_cases and output is not None:
        _check_output(output, manifest)
    proofs: Proofs = {}
    for adapter, record in records.items():
        measure = measure_own_cases if own_cases else measure_other_cases
        with nullcontext() if exact is None else open_exact(exact, manifest, adapter) as model:
            proofs[adapter] = measure(manifest, record, record.labels(), watch, adapter, forced_routing, model)
    if own_cases and not manifest.proven and not any(report.failed for report in proofs.values()):
        complete_proof(manifest, proofs, output or bundle)
    return proofs


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


def measure_own_cases(
    manifest: Manifest,
    reference: Reference,
    labels: Mapping[str, str],
    watch: Watch,
    adapter: str | None = None,
    forced_routing: bool = False,
    exact: Session | None = None,
) -> ParityReport:
    """Measure a bundle on the cases of its build; `forced_routing` and `exact` as for `measure`."""
    terms = _forcing(manifest.proof if adapter is None else own_terms(manifest.proof), forced_routing)
    return measure_bundle(manifest.bundle, reference, terms, labels, watch, adapter, exact)


def _forcing(terms: ProofTerms, too: bool) -> ProofTerms:
    """The terms, with forced routing where the build asked for it or, `too`, somebody does now."""
    return replace(terms, forced_routing=terms.forced_routing or too)


def measure_other_cases(
    manifest: Manifest,
    reference: Reference,
    labels: Mapping[str, str],
    watch: Watch,
    adapter: str | None = None,
    forced_routing: bool = False,
    exact: Session | None = None,
) -> ParityReport:
    """Measure a bundle on other cases than its build's, with the rows of the build's report that stand on its own.

    A bundle that is not proven yet has no such rows.
    """
    terms = _forcing(own_terms(manifest.proof), forced_routing)
    report = measure_bundle(manifest.bundle, reference, terms, labels, watch, adapter, exact)
    built: tuple[Row, ...] = ()
    if manifest.proven:
        built = recorded_rows(read_json(manifest.bundle / proof_path(adapter, "parity.json")))
    return replace(report, rows=(*report.rows, *built))


def open_records(manifest: Manifest, folders: Sequence[Path] = ()) -> dict[str | None, ReferenceRecord]:
    """The records of a bundle, of the model itself under None and of its adapters; or those in `folders`."""
    if not folders:
        return {adapter: open_own_record(manifest, adapter) for adapter in manifest.records}
    opened = [ReferenceRecord.open(folder) for folder in folders]
    return {
        adapter_of(manifest, record.checkpoint, "this record's checkpoint", record.folder): record for record in opened
    }


def open_own_record(manifest: Manifest, adapter: str | None) -> ReferenceRecord:
    """The record that a bundle brings, of the model with `adapter` or of the model itself."""
    folder = manifest.bundle / proof_path(adapter, RECORD_FOLDER)
    if not folder.is_dir():
        raise ArrieroError(
            "the bundle does not bring its reference record",
            where=str(manifest.bundle),
            expected=f"the record {manifest.records[adapter][:12]}..., which its build published apart",
            remedy="Give its folder with --record, or the checkpoint with --against",
        )
    record = ReferenceRecord.open(folder)
    adapter_of(manifest, record.checkpoint, "this record's checkpoint", folder)
    return record


def adapter_of(manifest: Manifest, checkpoint: str, what: str, where: object) -> str | None:
    """The adapter of a bundle that is merged in the checkpoint with hash `checkpoint`; None for the model itself.

    Raises ArrieroError for one that the bundle was not made from; `what` it is, and `where`.
    """
    hashes = {manifest.chain.checkpoint: None} | {one.checkpoint: name for name, one in manifest.adapters.items()}
    if checkpoint not in hashes:
        raise ArrieroError(
            f"the bundle was not made from {what}",
            where=str(where),
            expected=" or ".join(f"the hash {known[:12]}..." for known in hashes),
            remedy="Give what the bundle was built from, or build a bundle from this one",
        )
    return hashes[checkpoint]
