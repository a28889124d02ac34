"""The comparison of a bundle with the checkpoint itself: whole vocabulary, and a record that must say what it says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from arriero.errors import ArrieroError
from arriero.export.build_file.hash_checkpoint import hash_checkpoint
from arriero.export.proof.check_answers import check_answers
from arriero.export.proof.live_reference import LiveReference
from arriero.export.proof.measure_bundle import Watch, own_terms
from arriero.export.proof.prove import (
    adapter_of,
    measure_other_cases,
    measure_own_cases,
    open_own_record,
    open_records,
)
from arriero.export.proof.reference import open_reference
from arriero.export.samples.cases import draw_cases, encoded_sizes, shortening
from arriero.graphs.checkpoint import Checkpoint
from arriero.runtimes.backend import ModelSpec
from arriero.runtimes.integrity import open_manifest
from arriero.runtimes.manifest import Manifest, proof_path
from arriero.runtimes.proof.cases import ReferenceCase
from arriero.runtimes.proof.metrics import NEAR_TIE, ShapesDiffer, router_agreement
from arriero.runtimes.proof.record import ReferenceRecord
from arriero.runtimes.proof.report import ParityReport, read_json
from arriero.runtimes.proof.sketch import WholeArray
from arriero.thresholds import AnswerMode

if TYPE_CHECKING:
    from arriero.export.build_file.schema import Cases

# The record's walk and the reference's pieces sum float32 in another order: 1e-5 of the largest logit, ten times over.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class CheckedReference:
    """A live reference on a record's own cases, which refuses the record at the first case that says something else."""

    live: LiveReference
    record: ReferenceRecord

    @property
    def spec(self) -> ModelSpec:
        """The model's facts."""
        return self.live.spec

    @property
    def answers(self) -> AnswerMode:
        """How both answer."""
        return self.live.answers

    def __len__(self) -> int:
        return len(self.record)

    def __iter__(self) -> Iterator[ReferenceCase]:
        for recorded, live in zip(self.record, self.live, strict=True):
            if differences := list(find_differences(recorded, live)):
                raise ArrieroError(
                    f"the reference record says otherwise than the checkpoint: {', '.join(differences)}",
                    where=f"{self.record.folder}: case {recorded.case.name}",
                    expected="what the PyTorch reference says of this case",
                    remedy="The record was changed, or is of other code or weights: write it anew with `arriero build`",
                )
            yield live


def find_differences(recorded: ReferenceCase, live: ReferenceCase) -> Iterator[str]:
    """What a record says of a case otherwise than the live reference, beyond the order of float32 sums.

    A near tie of a router may fall either way on another machine, and everything after it differs; then numbers say
    nothing and ids alone are compared.
    """
    if not np.array_equal(recorded.forced_ids, live.forced_ids):
        yield "token ids"
        return
    ties = False
    for layer, ids in live.expert_ids.items():
        agreed = router_agreement(ids, np.asarray(recorded.expert_ids[layer]), live.margins.get(layer), NEAR_TIE)
        ties |= agreed.near_tie_flips > 0
        if agreed.real_flips:
            yield f"experts of layer {layer}"
    if ties:
        return
    parts = {"pixels": (recorded.pixels, live.pixels), "image features": (recorded.features, live.features)}
    parts["embeddings"] = recorded.embeddings, live.embeddings
    parts |= {f"layer {layer}": (recorded.hiddens[layer], live.hiddens[layer]) for layer in live.hiddens}
    for name, (kept, whole) in parts.items():
        if kept is None or whole is None:
            if kept is not whole:
                yield name
            continue
        assert isinstance(whole, WholeArray)
        try:
            if not kept.errors(whole.values).relative_l2 <= TOLERANCE:
                yield name
        except ShapesDiffer:
            yield name
    logits = live.logits.values  # type: ignore[attr-defined]
    figures = recorded.logits.figures(logits, NEAR_TIE)
    if not figures.largest_error <= TOLERANCE * float(np.abs(logits).max()):
        yield "logits"
    if not figures.sums.relative_l2 <= TOLERANCE:
        yield "logits as a whole"
    if list(recorded.generated_ids) != list(live.generated_ids) or recorded.generated_text != live.generated_text:
        yield "the generated answer"
    if figures.top.real_flips == 0 and not np.array_equal(recorded.top_tokens, live.top_tokens):
        near = np.count_nonzero(recorded.top_tokens != live.top_tokens)
        if near > figures.top.near_ties:
            yield "top tokens"


def prove_against(
    bundle: Path,
    checkpoint: Checkpoint,
    folder: Path | None,
    other: Cases | None,
    watch: Watch,
    forced_routing: bool = False,
) -> ParityReport:
    """Measure a published bundle against the PyTorch reference, by the thresholds that it was published under.

    The cases are those of its record (or of that in `folder`), which is refused where it differs; or `other` ones. A
    checkpoint with one of the bundle's adapters merged is what the bundle with that adapter is measured against. With
    `forced_routing` each side runs with the other's routing as well.
    Raises ArrieroError when the bundle was made from another checkpoint.
    """
    manifest = open_manifest(bundle)
    adapter = adapter_of(manifest, hash_checkpoint(checkpoint, watch), "this checkpoint", checkpoint.model)
    modalities = modalities_of(manifest)
    session = open_reference(checkpoint, "image" not in modalities)
    exact = session if forced_routing else None
    if other is not None:
        cases = draw_cases(other, modalities)
        check_answers(cases, own_terms(manifest.proof).thresholds)
        most = manifest.target.context - 1  # room for one token of an answer
        encoded_sizes(cases, session.processor, most, shortening(other))
        proven = manifest.bundle / proof_path(adapter, "parity.json")
        answers = read_json(proven).answers if manifest.proven else _record(manifest, folder, adapter).answers
        drawn, named = LiveReference(session, cases, answers), label_set(other)
        return measure_other_cases(manifest, drawn, named, watch, adapter, forced_routing, exact)
    record = _record(manifest, folder, adapter)
    live = LiveReference(session, [record.case(number).case for number in range(len(record))], record.answers)
    checked = CheckedReference(live, record)
    measure = measure_own_cases if record.hash == manifest.records[adapter] else measure_other_cases
    return measure(manifest, checked, record.labels(), watch, adapter, forced_routing, exact)


def _record(manifest: Manifest, folder: Path | None, adapter: str | None) -> ReferenceRecord:
    """The bundle's own record of the model with `adapter`, or that in `folder`, which has to be of the same."""
    if folder is None:
        return open_own_record(manifest, adapter)
    records = open_records(manifest, [folder])
    if adapter not in records:
        what = "is the record of the model with another adapter than the checkpoint"
        raise ArrieroError(what, where=str(folder), remedy="Give the record that was made from the checkpoint")
    return records[adapter]


def open_live(checkpoint: Checkpoint, cases: Cases, modalities: Sequence[str]) -> LiveReference:
    """The reference of a checkpoint on these cases, for bundles of these modalities."""
    return LiveReference(open_reference(checkpoint, "image" not in modalities), draw_cases(cases, modalities))


def label_set(cases: Cases) -> Mapping[str, str]:
    """What names drawn cases in a report."""
    return {"held-out prompts": Path(cases.set).name, "seed": str(cases.seed)}


def modalities_of(manifest: Manifest) -> tuple[str, ...]:
    """What a bundle takes in."""
    return ("text",) if manifest.model.vision is None else ("text", "image")


def check_origin(manifests: Sequence[Manifest], checkpoint: Checkpoint, watch: Watch) -> None:
    """Refuse bundles that were not made from this checkpoint, which is hashed once for all of them."""
    content = hash_checkpoint(checkpoint, watch)
    for manifest in manifests:
        if (adapter := adapter_of(manifest, content, "this checkpoint", checkpoint.model)) is not None:
            what = f"has the adapter {adapter} merged, and bundles are compared without one"
            raise ArrieroError(what, where=str(checkpoint.model), remedy="Leave out --adapter")
