"""A bundle measured against a reference: what a build does before publishing, and a device after."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from arriero.errors import ArrieroError
from arriero.export.machine.versions import installed_versions
from arriero.export.proof.emulate import EmulatedBackend
from arriero.runtimes.api import open_session
from arriero.runtimes.bundle_memory import weight_bytes
from arriero.runtimes.cpu import describe_processor
from arriero.runtimes.integrity import open_manifest
from arriero.runtimes.machine_fit import is_foreign
from arriero.runtimes.manifest import Manifest, ProofTerms
from arriero.runtimes.memory import available_memory
from arriero.runtimes.processor.processor import Processor
from arriero.runtimes.proof.cases import Reference
from arriero.runtimes.proof.logits import KlSums
from arriero.runtimes.proof.parity import measure
from arriero.runtimes.proof.report import ParityReport
from arriero.runtimes.proof.rows import judge
from arriero.runtimes.proof.shared_steps import tokens_together
from arriero.runtimes.session import Session
from arriero.runtimes.steps import forces_routing
from arriero.thresholds import OVER_RTN
from arriero.traits import TRAITS
from arriero.version import __version__

EXACT = "exact"  # as a manifest's weight table says it of a scheme
NAMED = 8  # experts that a report's header names; the rest it counts, and its heat map shows them

Watch = Callable[[str, int, int, str], None]


def measure_bundle(
    bundle: Path,
    reference: Reference,
    terms: ProofTerms,
    labels: Mapping[str, str],
    watch: Watch,
    adapter: str | None = None,
    exact: Session | None = None,
    memory: int | None = None,
) -> ParityReport:
    """Measure the bundle, answering with `adapter`, against a reference, by `terms`.

    `labels` name the reference in the report; `exact` is a session of the exact model to run with the bundle's routing.
    `memory` are the bytes that this may use, None for what is free; they change no bit of the report.
    """
    rtn = None if terms.rtn is None else KlSums(terms.rtn.mean, terms.rtn.error**2, terms.rtn.mean, 1)
    step = f"{Manifest.read(bundle).name}: prove parity" + ("" if adapter is None else f" with {adapter}")
    watch(step, 0, len(reference), "samples")  # checking and loading a large bundle take their time
    with open_candidate(bundle, adapter) as (manifest, candidate):
        target = manifest.target
        report = measure(
            candidate,
            reference,
            terms.thresholds,
            lambda done, total, _case: watch(step, done, total, "samples"),
            rtn_kl=rtn,
            forced_routing=terms.forced_routing,
            exact=exact,
            together=tokens_together(manifest.model, weight_bytes(manifest), memory, available_memory()),
        )
    own = {"bundle": target.name, "profile": target.profile, "backend": target.backend, "KV cache": target.kv_cache}
    own |= {} if adapter is None else {"adapter": adapter}
    if manifest.synthetic:
        own["checkpoint"] = str(manifest.source)
    own |= circumstances({target.backend}, target.arch if is_foreign(manifest) else None)
    thin, calibrated = manifest.rounded.fallback, manifest.calibrated.coverage
    if thin:
        named = ", ".join(map(str, thin[:NAMED])) + f" and {len(thin) - NAMED:,} more" * (len(thin) > NAMED)
        own["experts rounded without calibration"] = named
    unmeasured = () if terms.unmeasured is None else (judge(OVER_RTN, None, None, terms.unmeasured),)
    return replace(
        report,
        rows=(*report.rows, *unmeasured),
        labels={**own, **labels},
        coverage={int(layer): counts for layer, counts in calibrated.items()},
        fallback=thin,
        synthetic=manifest.synthetic,
    )


def circumstances(backends: Collection[str], emulated: str | None = None) -> dict[str, str]:
    """When and where a report was measured, and with which versions; `emulated` is an architecture under emulation."""
    packages = [package for name in sorted(backends) for package in TRAITS[name].packages]
    versions = {"arriero": __version__, **installed_versions(packages)}
    return {
        "measured": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{emulated} under emulation on {describe_processor()}" if emulated else describe_processor(),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def own_terms(terms: ProofTerms) -> ProofTerms:
    """The terms without the RTN baseline, which was measured on the build's cases and the model itself alone."""
    limits = {name: limit for name, limit in terms.thresholds.items() if name != OVER_RTN}
    return ProofTerms(limits, forced_routing=terms.forced_routing)


@contextmanager
def open_exact(bundle: Path, beside: Manifest, adapter: str | None) -> Iterator[Session]:
    """A session over the exact `bundle` of the checkpoint that the bundle `beside` was made from.

    Raises ArrieroError for one that is of another checkpoint, rounded, or of graphs that take no expert ids.
    """
    manifest = Manifest.read(bundle)
    rounded = next((name for name, weight in manifest.weights.items() if weight.scheme != EXACT), None)
    if manifest.chain.checkpoint != beside.chain.checkpoint:
        raise _not_exact(bundle, "is made from another checkpoint than the measured one")
    if rounded is not None:
        raise _not_exact(bundle, f"has {rounded} stored as {manifest.weights[rounded].scheme}")
    if manifest.target.kv_cache != "float32":
        raise _not_exact(bundle, f"keeps keys and values in {manifest.target.kv_cache}")
    with open_candidate(bundle, adapter) as (_, session):
        if not forces_routing(session.backend):
            raise _not_exact(bundle, "takes no expert ids: those for GPUs, of older builds and of dense models do not")
        yield session


def _not_exact(bundle: Path, what: str) -> ArrieroError:
    return ArrieroError(
        f"the bundle given as exact {what}",
        where=str(bundle),
        expected="an exact bundle of the same checkpoint, for a CPU",
        remedy="Build one with `profile: fp32`",
    )


@contextmanager
def open_candidate(bundle: Path, adapter: str | None = None) -> Iterator[tuple[Manifest, Session]]:
    """The bundle's manifest and a session over it, under emulation when it was compiled for another architecture."""
    manifest = open_manifest(bundle)
    if not is_foreign(manifest):
        with open_session(manifest, adapter=adapter) as session:
            yield manifest, session
        return
    target = manifest.target
    processor = Processor(bundle / "tokenizer", manifest.model)
    backend = EmulatedBackend(bundle, manifest.model, target.arch)
    with Session(backend, processor, target.context, target.batch, tuple(manifest.adapters), adapter) as session:
        yield manifest, session
