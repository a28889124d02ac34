"""Parity of a bundle against the checkpoint it was made from: what a build does before publishing, and CI after."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from arriero.errors import ArrieroError
from arriero.export.proof.emulate import EmulatedBackend
from arriero.export.proof.rtn_baseline import recorded_rows
from arriero.export.samples.cases import draw_cases, encoded_sizes
from arriero.graphs.checkpoint import Checkpoint
from arriero.runtimes.api import open_session
from arriero.runtimes.integrity import open_manifest
from arriero.runtimes.machine_fit import is_foreign
from arriero.runtimes.manifest import Manifest
from arriero.runtimes.proof.parity import compare
from arriero.runtimes.proof.report import ParityReport, read_json
from arriero.thresholds import ALWAYS, OVER_RTN, PER_FAMILY

if TYPE_CHECKING:
    from arriero.export.build_file.schema import Cases
    from arriero.runtimes.manifest import Manifest
    from arriero.runtimes.proof.parity import ParityCase
    from arriero.runtimes.session import Session

Watch = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class Judge:
    """What bundles are judged by: the reference, the held-out prompts, and the labels that name these in a report."""

    reference: Session
    cases: Sequence[ParityCase]
    labels: Mapping[str, str]

    @classmethod
    def open(cls, checkpoint: Path, wanted: Cases, modalities: Sequence[str]) -> Judge:
        """Open the reference of a checkpoint folder and draw the cases, for bundles of these modalities."""
        # Imported here: an unchanged build never gets this far, and torch takes a second to import.
        from arriero.export.proof.reference import open_reference

        labels = {"held-out prompts": Path(wanted.set).name, "seed": str(wanted.seed)}
        return cls(open_reference(checkpoint, "image" not in modalities), draw_cases(wanted, modalities), labels)


def modalities_of(manifest: Manifest) -> tuple[str, ...]:
    """What a bundle takes in."""
    return ("text",) if manifest.model.vision is None else ("text", "image")


def measure(bundle: Path, judge: Judge, thresholds: Mapping[str, float], watch: Watch) -> ParityReport:
    """Compare the bundle with the judge's reference on its cases."""
    with open_candidate(bundle) as (manifest, candidate):
        target = manifest.target
        step = f"{target.name}: prove parity"
        encoded_sizes(judge.cases, candidate.processor, candidate.context - 1)  # room for one token of an answer
        report = compare(
            judge.reference,
            candidate,
            judge.cases,
            {name: value for name, value in thresholds.items() if name != OVER_RTN},  # only a build can measure it
            lambda done, total, _case: watch(step, done, total, "samples"),
        )
    labels = {"bundle": target.name, "profile": target.profile, "backend": target.backend}
    labels |= {"KV cache": target.kv_cache, **judge.labels}
    if manifest.rounded.fallback:
        labels["experts rounded without calibration"] = "; ".join(map(str, manifest.rounded.fallback))
    return replace(report, labels=labels)


@contextmanager
def open_candidate(bundle: Path) -> Iterator[tuple[Manifest, Session]]:
    """The bundle's manifest and a session over it, under emulation when it was compiled for another architecture."""
    manifest = open_manifest(bundle)
    if not is_foreign(manifest):
        with open_session(manifest) as session:
            yield manifest, session
        return
    from arriero.runtimes.processor.processor import Processor
    from arriero.runtimes.session import Session

    target = manifest.target
    processor = Processor(bundle / "tokenizer", manifest.model)
    backend = EmulatedBackend(bundle, manifest.model, target.arch)
    with Session(backend, processor, target.context, target.batch) as session:
        yield manifest, session


def check_answers(cases: Sequence[ParityCase], thresholds: Mapping[str, float]) -> None:
    """Refuse thresholds on task accuracy that no case has an answer for: they could only fail."""
    scored = sorted({case.family for case in cases if case.score})
    for name in thresholds:
        metric, _, family = name.partition(".")
        if metric in PER_FAMILY and (not scored or (family and family not in scored)):
            raise ArrieroError(
                f"no parity case{f' of {family}' if family else ''} has an answer",
                where=f"thresholds.{name}",
                expected=f"cases with answers (there are some of: {', '.join(scored) or 'none'})",
                remedy="Give answers to the cases of the set, more samples, or another profile",
            )


def prove_bundle(bundle: Path, checkpoint: Path, wanted: Cases, watch: Watch) -> ParityReport:
    """Measure a published bundle again on the `wanted` cases, with the thresholds it was published under.

    What only a build can measure, the RTN baseline's KL, is taken over from the recorded report.

    Raises `ArrieroError` when the bundle was made from another checkpoint.
    """
    check_origin(bundle, checkpoint)
    recorded = read_json(bundle / "parity.json")
    thresholds = {
        row.metric: row.threshold for row in recorded.rows if row.threshold is not None and row.metric not in ALWAYS
    }
    judge = Judge.open(checkpoint, wanted, modalities_of(open_manifest(bundle)))
    check_answers(judge.cases, thresholds)
    report = measure(bundle, judge, thresholds, watch)
    return replace(report, rows=(*report.rows, *recorded_rows(recorded)))


def check_origin(bundle: Path, checkpoint: Path) -> None:
    """Refuse a bundle that was not made from this checkpoint."""
    manifest = open_manifest(bundle)
    found = Checkpoint.open(checkpoint).content_hash()
    if manifest.chain.checkpoint != found:
        raise ArrieroError(
            "the bundle was not made from this checkpoint",
            where=str(checkpoint),
            expected=f"a checkpoint with hash {manifest.chain.checkpoint[:12]}...",
            remedy="Give the checkpoint that the bundle was built from, or build a bundle from this one",
        )
