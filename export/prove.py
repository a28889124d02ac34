"""Parity of a bundle against the checkpoint it was made from: what a build does before publishing, and CI after."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arriero.errors import ArrieroError
from arriero.export.cases import parity_cases
from arriero.export.emulate import EmulatedBackend, is_foreign
from arriero.export.naive import recorded_rows
from arriero.graphs.checkpoint import Checkpoint
from arriero.profiles.recipe import OVER_NAIVE
from arriero.runtimes.api import open_session
from arriero.runtimes.manifest import Manifest, open_manifest
from arriero.runtimes.parity import compare
from arriero.runtimes.report import ALWAYS, ParityReport, read_json

if TYPE_CHECKING:
    from arriero.runtimes.session import Session

Watch = Callable[[str, int, int, str], None]


def open_reference(checkpoint: Path, text_only: bool) -> Session:
    """The PyTorch reference of a checkpoint folder, as a session. Raises `ArrieroError` when it is not sound."""
    # Imported here: an unchanged build never gets this far, and torch takes a second to import.
    from arriero.runtimes.processor import Processor
    from arriero.runtimes.session import Session
    from arriero.runtimes.torch import TorchBackend

    backend = TorchBackend(checkpoint, text_only)
    return Session(backend, Processor(checkpoint, backend.spec))


def measure(
    bundle: Path, checkpoint: Path, samples: int, seed: int, thresholds: Mapping[str, float], watch: Watch
) -> ParityReport:
    """Compare the bundle with the reference on `samples` held-out prompts, text and, if it sees, images."""
    with open_candidate(bundle) as (manifest, candidate):
        text_only = candidate.spec.vision is None
        cases = parity_cases(("text",) if text_only else ("text", "image"), samples, seed)
        target = manifest.target
        step = f"{target.name}: prove parity"
        report = compare(
            open_reference(checkpoint, text_only),
            candidate,
            cases,
            {name: value for name, value in thresholds.items() if name != OVER_NAIVE},  # only a build can measure it
            lambda done, total, _case: watch(step, done, total, "samples"),
        )
    labels = {"bundle": target.name, "profile": target.profile, "backend": target.backend}
    labels |= {"KV cache": target.kv_cache, "seed": str(seed)}
    fallback = manifest.raw.get("fallback") or ()
    if fallback:
        labels["experts rounded without calibration"] = "; ".join(map(tell_fallback, fallback))
    return replace(report, labels=labels)


@contextmanager
def open_candidate(bundle: Path) -> Iterator[tuple[Manifest, Session]]:
    """The bundle's manifest and a session over it, under emulation when it was compiled for another architecture."""
    manifest = Manifest.read(bundle)
    if not is_foreign(manifest):
        manifest = open_manifest(bundle)
        with open_session(manifest) as session:
            yield manifest, session
        return
    from arriero.runtimes.processor import Processor
    from arriero.runtimes.session import Session

    target = manifest.target
    processor = Processor(bundle / "tokenizer", manifest.model)
    backend = EmulatedBackend(bundle, manifest.model, target.arch)
    with Session(backend, processor, target.context, target.batch) as session:
        yield manifest, session


def tell_fallback(entry: Mapping[str, Any]) -> str:
    """One entry of the manifest's `fallback` for people."""
    return f"layer {entry['layer']} expert {entry['expert']} ({entry['tokens']} tokens)"


def prove_bundle(bundle: Path, checkpoint: Path, samples: int, seed: int, watch: Watch) -> ParityReport:
    """Measure a published bundle again, with the thresholds it was published under.

    What only a build can measure, the naive form's KL, is taken over from the recorded report.

    Raises `ArrieroError` when the bundle was made from another checkpoint.
    """
    check_origin(bundle, checkpoint)
    recorded = read_json(bundle / "parity.json")
    thresholds = {
        row.metric: row.threshold for row in recorded.rows if row.threshold is not None and row.metric not in ALWAYS
    }
    report = measure(bundle, checkpoint, samples, seed, thresholds, watch)
    return replace(report, rows=(*report.rows, *recorded_rows(recorded)))


def check_origin(bundle: Path, checkpoint: Path) -> None:
    """Refuse a bundle that was not made from this checkpoint."""
    manifest = open_manifest(bundle)
    found = Checkpoint.open(checkpoint).content_hash()
    if manifest.raw["chain"]["checkpoint"] != found:
        raise ArrieroError(
            "the bundle was not made from this checkpoint",
            where=str(checkpoint),
            expected=f"a checkpoint with hash {manifest.raw['chain']['checkpoint'][:12]}...",
            remedy="Give the checkpoint that the bundle was built from, or build a bundle from this one",
        )
