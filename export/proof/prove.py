"""Parity of a bundle against a reference record: what a build does before publishing, and a device after.

Nothing here needs PyTorch, the checkpoint, or more than the runtime's own packages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from arriero.errors import ArrieroError
from arriero.export.proof.emulate import EmulatedBackend
from arriero.runtimes.api import open_session
from arriero.runtimes.integrity import check_proven, open_manifest
from arriero.runtimes.machine_fit import is_foreign
from arriero.runtimes.manifest import RECORD_FOLDER, Manifest
from arriero.runtimes.processor.processor import Processor
from arriero.runtimes.proof.cases import Reference
from arriero.runtimes.proof.logits import KlSums
from arriero.runtimes.proof.parity import measure
from arriero.runtimes.proof.record import ReferenceRecord
from arriero.runtimes.proof.report import ParityReport, read_json
from arriero.runtimes.proof.rows import ALWAYS, OVER_RTN
from arriero.runtimes.proof.rtn_baseline import recorded_kl, recorded_rows
from arriero.runtimes.session import Session

Watch = Callable[[str, int, int, str], None]
RECORD_LABEL = "reference record"


def measure_bundle(
    bundle: Path,
    reference: Reference,
    thresholds: Mapping[str, float],
    labels: Mapping[str, str],
    watch: Watch,
    rtn_kl: KlSums | None = None,
) -> ParityReport:
    """Measure the bundle against a reference; `labels` name that in the report."""
    with open_candidate(bundle) as (manifest, candidate):
        target = manifest.target
        step = f"{target.name}: prove parity"
        report = measure(
            candidate,
            reference,
            thresholds,
            lambda done, total, _case: watch(step, done, total, "samples"),
            rtn_kl=rtn_kl,
        )
    own = {"bundle": target.name, "profile": target.profile, "backend": target.backend, "KV cache": target.kv_cache}
    if manifest.rounded.fallback:
        own["experts rounded without calibration"] = "; ".join(map(str, manifest.rounded.fallback))
    return replace(report, labels={**own, **labels})


@contextmanager
def open_candidate(bundle: Path) -> Iterator[tuple[Manifest, Session]]:
    """The bundle's manifest and a session over it, under emulation when it was compiled for another architecture."""
    manifest = open_manifest(bundle)
    if not is_foreign(manifest):
        with open_session(manifest) as session:
            yield manifest, session
        return
    target = manifest.target
    processor = Processor(bundle / "tokenizer", manifest.model)
    backend = EmulatedBackend(bundle, manifest.model, target.arch)
    with Session(backend, processor, target.context, target.batch) as session:
        yield manifest, session


def prove_bundle(bundle: Path, folder: Path | None, watch: Watch) -> ParityReport:
    """Measure a published bundle again, here, against its own record or that in `folder`, by its own thresholds.

    What only a build can measure, the RTN baseline's KL, is taken from its report: against the same record the bundle
    is judged by it anew; against another, what the build found stands as it is. Raises ArrieroError for a record of
    another checkpoint, and where a bundle brings none.
    """
    check_integrity(bundle)
    record = open_record(bundle, folder)
    built = read_json(bundle / "parity.json")
    if built.labels.get(RECORD_LABEL) == record.hash:
        return measure_bundle(bundle, record, judged_by(built), record.labels(), watch, recorded_kl(built))
    report = measure_bundle(bundle, record, judged_by(built, other_cases=True), record.labels(), watch)
    return replace(report, rows=(*report.rows, *recorded_rows(built)))


def check_integrity(bundle: Path) -> None:
    """Refuse a bundle that is not what its build published, whatever machine it is for."""
    check_proven(open_manifest(bundle))


def open_record(bundle: Path, folder: Path | None) -> ReferenceRecord:
    """The record of a bundle, or that in `folder`, which has to be of the bundle's checkpoint."""
    manifest = Manifest.read(bundle)
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


def judged_by(built: ParityReport, other_cases: bool = False) -> dict[str, float]:
    """The thresholds that a bundle was published under; on other cases, without the one that the build's cases need."""
    left_out = {*ALWAYS, *((OVER_RTN,) if other_cases else ())}
    return {row.metric: row.threshold for row in built.rows if row.threshold is not None and row.metric not in left_out}
