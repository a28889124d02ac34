"""Parity: a candidate session against the reference on the same cases, as rows with thresholds.

Three looks per case. Teacher forcing: the reference's ids of prompt and answer go through both, with captures. Parts:
vision tower and embeddings alone, fed alike, so that an error shows where it arises. Greedy generation: each side
on its own, for the common prefix and for the task's own score.
B=1, S prompt and answer tokens, H hidden, V vocabulary, k experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from arriero.errors import ArrieroError
from arriero.runtimes.proof import metrics
from arriero.runtimes.proof.metrics import Agreement, ErrorSums
from arriero.runtimes.proof.report import (
    CaseResult,
    FamilyScore,
    LayerSeries,
    ParityReport,
    judge,
)
from arriero.thresholds import ALWAYS, FORCED, PER_FAMILY, check_thresholds

if TYPE_CHECKING:
    from arriero.runtimes.backend import ModelSpec, StepOutput
    from arriero.runtimes.session import Session


@dataclass(frozen=True)
class ParityCase:
    """One held-out prompt with its expected answer; `score` says whether a generated text is right."""

    name: str
    family: str
    prompt: Any  # what Processor.encode takes: text or messages
    images: Sequence[Any] = ()
    answer: str = ""
    score: Callable[[str], bool] | None = None


def compare(
    reference: Session,
    candidate: Session,
    cases: Sequence[ParityCase],
    thresholds: Mapping[str, float],
    progress: Callable[[int, int, str], None] | None = None,
    max_new_tokens: int = 64,
    near_tie: float = metrics.NEAR_TIE,
) -> ParityReport:
    """Every row of the parity report; `progress(done, total, case name)` is called after each case.

    `near_tie` is the margin below which a choice of the reference counts as open: in logits for tokens, in router
    logits for experts. A threshold on something that could not be measured fails. Raises ArrieroError for unknown
    thresholds, no cases, models that are not alike, and outputs that are not of the reference's shape.
    """
    check_thresholds(thresholds)
    if not cases:
        raise ArrieroError("no parity cases", expected="at least one", remedy="Give the parity set some samples")
    _check_specs(reference.backend.spec, candidate.backend.spec)
    tally = _Tally(reference.backend.spec, near_tie)
    for done, case in enumerate(cases, 1):
        try:
            tally.results.append(_run_case(tally, reference, candidate, case, max_new_tokens))
        except metrics.ShapesDiffer as error:
            raise ArrieroError(
                str(error), where=f"parity case {case.name}", remedy="The candidate is not of this model; rebuild it"
            ) from error
        if progress:
            progress(done, len(cases), case.name)
    return tally.report(thresholds)


class _Tally:
    """Sums over the cases, and the rows that follow from them."""

    def __init__(self, spec: ModelSpec, near_tie: float) -> None:
        self.spec, self.near_tie = spec, near_tie
        self.results: list[CaseResult] = []
        self.nonfinite: dict[str, int] = {}
        self.different_prompts: list[str] = []
        self.logits, self.embeddings, self.vision = ErrorSums(), ErrorSums(), ErrorSums()
        self.kl_sum, self.tokens, self.top = 0.0, 0, Agreement()
        self.hidden: dict[int, ErrorSums] = {}
        self.routers: dict[int, Agreement] = {}
        self.uncaptured: set[str] = set()

    def watch(self, what: str, array: np.ndarray) -> None:
        """Count the values of `array` that are not finite."""
        if bad := int(array.size - np.isfinite(array).sum()):
            self.nonfinite[what] = self.nonfinite.get(what, 0) + bad

    def add_outputs(
        self, reference: StepOutput, candidate: StepOutput, margins: Mapping[int, np.ndarray]
    ) -> tuple[ErrorSums, float, Agreement, int | None]:
        """Add one teacher-forced pass; gives this case's logits sums, KL sum, top-token agreement, router flips."""
        left, right = reference.logits[0], candidate.logits[0]
        self.watch("reference logits", left)
        self.watch("candidate logits", right)
        sums, top = ErrorSums.of(left, right), metrics.same_top_token(left, right, self.near_tie)
        kl = float(metrics.kl_per_token(left, right).sum())
        self.logits, self.top = self.logits + sums, self.top + top
        self.kl_sum, self.tokens = self.kl_sum + kl, self.tokens + len(left)
        for layer, hidden in reference.hiddens.items():
            if layer not in candidate.hiddens:
                self.uncaptured.add(f"hidden.{layer}")
                continue
            self.watch(f"reference layer {layer}", hidden)
            self.watch(f"candidate layer {layer}", candidate.hiddens[layer])
            self.hidden[layer] = self.hidden.get(layer, ErrorSums()) + ErrorSums.of(hidden, candidate.hiddens[layer])
        flips: int | None = None
        for layer, ids in reference.expert_ids.items():
            if layer not in candidate.expert_ids:
                self.uncaptured.add(f"expert_id.{layer}")
                continue
            agreed = metrics.router_agreement(ids[0], candidate.expert_ids[layer][0], margins.get(layer), self.near_tie)
            self.routers[layer] = self.routers.get(layer, Agreement()) + agreed
            flips = (flips or 0) + agreed.real_flips
        return sums, kl, top, flips

    def report(self, thresholds: Mapping[str, float]) -> ParityReport:
        """The report over everything added so far."""
        families = _families(self.results)
        values = {**self._whole(), **self._parts(), **self._layers(), **self._tasks(families)}
        for name in thresholds:
            if name not in values:
                known = ", ".join(score.family for score in families) or "none"
                values[name] = (None, f"no scored case of this family (scored families: {known})")
        limits = {**ALWAYS, **thresholds}
        return ParityReport(
            rows=tuple(judge(name, value, limits.get(name), detail) for name, (value, detail) in values.items()),
            layers=tuple(self._series()),
            families=families,
            cases=tuple(self.results),
            near_tie=self.near_tie,
        )

    def _whole(self) -> dict[str, tuple[float | None, str]]:
        cases = len(self.results)
        different = ", ".join(self.different_prompts[:5])
        worst_error = _worst(self.results, lambda case: case.logits_max_abs_error)
        worst_relative = _worst(self.results, lambda case: case.logits_relative_l2)
        worst_kl = _worst(self.results, lambda case: case.kl_mean)
        return {
            "same_prompt": (
                1.0 - len(self.different_prompts) / cases,
                f"differ: {different}" if different else f"{cases} cases",
            ),
            "nonfinite_values": (
                float(sum(self.nonfinite.values())),
                "; ".join(f"{what}: {count}" for what, count in self.nonfinite.items()),
            ),
            "logits_max_abs_error": (self.logits.max_abs, f"worst case {worst_error.name}"),
            "logits_relative_l2": (
                self.logits.relative_l2,
                f"SNR {self.logits.snr_db:.1f} dB; worst case {worst_relative.name} "
                f"at {worst_relative.logits_relative_l2:.3g}",
            ),
            "logits_kl_mean": (
                self.kl_sum / self.tokens,
                f"{self.tokens} tokens; worst case {worst_kl.name} at {worst_kl.kl_mean:.3g}",
            ),
            "same_top_token": (self.top.fraction, str(self.top)),
        }

    def _parts(self) -> dict[str, tuple[float | None, str]]:
        seen = self.vision.count > 0
        return {
            "vision_relative_l2": (
                self.vision.relative_l2 if seen else None,
                f"largest error {self.vision.max_abs:.3g}" if seen else "no image cases",
            ),
            "embeddings_relative_l2": (
                self.embeddings.relative_l2,
                f"largest error {self.embeddings.max_abs:.3g}",
            ),
        }

    def _layers(self) -> dict[str, tuple[float | None, str]]:
        moe = [number for number, layer in enumerate(self.spec.layers) if layer.ffn == "moe"]
        missing = [number for number in moe if f"expert_id.{number}" in self.uncaptured or number not in self.routers]
        agreed = sum(self.routers.values(), Agreement())
        shares = {layer: share for layer, one in self.routers.items() if (share := one.fraction) is not None}
        if not moe or missing:
            why = f"no expert ids for layers {missing}" if missing else "the model has no MoE layers"
            routers: dict[str, tuple[float | None, str]] = {
                "router_agreement": (None, why),
                "router_agreement_lowest": (None, why),
            }
        else:
            lowest = min(shares, key=lambda layer: shares[layer], default=None)
            routers = {
                "router_agreement": (agreed.fraction, f"{len(moe)} layers: {agreed}"),
                "router_agreement_lowest": (
                    None if lowest is None else shares[lowest],
                    "every choice is a near tie" if lowest is None else f"layer {lowest}: {self.routers[lowest]}",
                ),
            }
        absent = [n for n in range(len(self.spec.layers)) if f"hidden.{n}" in self.uncaptured or n not in self.hidden]
        if absent:
            why = f"no hidden states for layers {absent}"
            return routers | {"layer_relative_l2_highest": (None, why), "layer_snr_db_lowest": (None, why)}
        worst = max(self.hidden, key=lambda layer: _nan_last(self.hidden[layer].relative_l2))
        return routers | {
            "layer_relative_l2_highest": (self.hidden[worst].relative_l2, f"layer {worst}"),
            "layer_snr_db_lowest": (self.hidden[worst].snr_db, f"layer {worst}"),
        }

    def _tasks(self, families: Sequence[FamilyScore]) -> dict[str, tuple[float | None, str]]:
        prefix = sum(case.greedy_prefix for case in self.results) / len(self.results)
        whole = sum(case.greedy_prefix == 1.0 for case in self.results)
        values: dict[str, tuple[float | None, str]] = {
            "greedy_prefix_length": (prefix, f"{whole} of {len(self.results)} answers equal to the last token")
        }
        if not families:
            return values | dict.fromkeys(
                (name for name in PER_FAMILY if name in FORCED), (None, "no case has a score")
            )
        total = FamilyScore(
            "",
            *(
                sum(getattr(score, name) for score in families)
                for name in ("count", "reference_right", "candidate_right", "lost", "gained")
            ),
        )
        for score in (total, *families):
            values |= _accuracy_rows(score)
        return values

    def _series(self) -> list[LayerSeries]:
        series = []
        for number, layer in enumerate(self.spec.layers):
            hidden, router = self.hidden.get(number), self.routers.get(number)
            series.append(
                LayerSeries(
                    layer=number,
                    attention=layer.attention,
                    ffn=layer.ffn,
                    relative_l2=hidden.relative_l2 if hidden else None,
                    snr_db=hidden.snr_db if hidden else None,
                    router_agreement=router.fraction if router else None,
                    near_ties=router.near_ties if router else 0,
                    near_tie_flips=router.near_tie_flips if router else 0,
                    real_flips=router.real_flips if router else 0,
                )
            )
        return series


def _run_case(
    tally: _Tally, reference: Session, candidate: Session, case: ParityCase, max_new_tokens: int
) -> CaseResult:
    prompt, other = (side.encode(case.prompt, list(case.images)) for side in (reference, candidate))
    if not (
        np.array_equal(prompt.input_ids, other.input_ids) and _same_pixels(prompt.pixel_values, other.pixel_values)
    ):
        tally.different_prompts.append(case.name)
    pixels = prompt.pixel_values
    _compare_parts(tally, reference, candidate, prompt.input_ids, pixels)
    forced = np.concatenate([prompt.input_ids, reference.processor.tokenize(case.answer)])
    left, margins = _logits_with_margins(reference, forced, pixels)
    right = candidate.logits(forced, pixels, captures=True)
    sums, kl, top, router_flips = tally.add_outputs(left, right, margins)
    room = min(reference.context, candidate.context) - max(len(prompt.input_ids), len(other.input_ids))
    limit = max(1, min(max_new_tokens, room))
    ours, theirs = reference.generate(prompt, max_tokens=limit), candidate.generate(other, max_tokens=limit)
    return CaseResult(
        name=case.name,
        family=case.family,
        tokens=len(forced),
        image_tiles=0 if pixels is None else len(pixels),
        logits_relative_l2=sums.relative_l2,
        logits_max_abs_error=sums.max_abs,
        kl_mean=kl / len(forced),
        token_flips=top.real_flips,
        router_flips=router_flips,
        greedy_prefix=metrics.common_prefix(ours.token_ids, theirs.token_ids),
        expected=case.answer,
        reference_text=ours.text,
        candidate_text=theirs.text,
        reference_right=bool(case.score(ours.text)) if case.score else None,
        candidate_right=bool(case.score(theirs.text)) if case.score else None,
    )


def _compare_parts(
    tally: _Tally, reference: Session, candidate: Session, input_ids: np.ndarray, pixels: np.ndarray | None
) -> None:
    """Vision on the same pixels, then embeddings on the same features: [n, 3, h, w] -> [M, H] -> [1, S, H]."""
    features = np.zeros((0, tally.spec.hidden_size), np.float32)
    if pixels is not None:
        features, theirs = reference.backend.vision(pixels), candidate.backend.vision(pixels)
        tally.watch("reference image features", features)
        tally.watch("candidate image features", theirs)
        tally.vision += ErrorSums.of(features, theirs)
    left = reference.backend.embed(input_ids[None], features)
    right = candidate.backend.embed(input_ids[None], features)
    tally.watch("reference embeddings", left)
    tally.watch("candidate embeddings", right)
    tally.embeddings += ErrorSums.of(left, right)


def _logits_with_margins(
    session: Session, input_ids: np.ndarray, pixels: np.ndarray | None
) -> tuple[StepOutput, dict[int, np.ndarray]]:
    """The teacher-forced pass, and per MoE layer the router margins [S] if the session's backend can tell them."""
    record = getattr(session.backend, "router_margins", None)
    if record is None:
        return session.logits(input_ids, pixels, captures=True), {}
    with record() as noted:
        output = session.logits(input_ids, pixels, captures=True)
    return output, {layer: np.concatenate(pieces) for layer, pieces in noted.items()}


def _same_pixels(left: np.ndarray | None, right: np.ndarray | None) -> bool:
    if left is None or right is None:
        return left is right
    return np.array_equal(left, right)


def _check_specs(reference: ModelSpec, candidate: ModelSpec) -> None:
    for name in ("vocab_size", "hidden_size", "num_local_experts", "num_experts_per_tok", "layers"):
        left, right = getattr(reference, name), getattr(candidate, name)
        if left != right:
            left, right = (f"{len(left)} layers", f"{len(right)} or others") if name == "layers" else (left, right)
            raise ArrieroError(
                f"the candidate's {name} is {right}",
                expected=f"{left}, as in the reference",
                remedy="Compare a bundle with the checkpoint it was built from",
            )


def _families(results: Sequence[CaseResult]) -> tuple[FamilyScore, ...]:
    scored: dict[str, list[CaseResult]] = {}
    for case in results:
        if case.reference_right is not None:
            scored.setdefault(case.family, []).append(case)
    return tuple(
        FamilyScore(
            family=family,
            count=len(cases),
            reference_right=sum(bool(case.reference_right) for case in cases),
            candidate_right=sum(bool(case.candidate_right) for case in cases),
            lost=sum(bool(case.reference_right) and not case.candidate_right for case in cases),
            gained=sum(bool(case.candidate_right) and not case.reference_right for case in cases),
        )
        for family, cases in scored.items()
    )


def _accuracy_rows(score: FamilyScore) -> dict[str, tuple[float | None, str]]:
    suffix = f".{score.family}" if score.family else ""
    rows: dict[str, tuple[float | None, str]] = {}
    for side, right in (("reference", score.reference_right), ("candidate", score.candidate_right)):
        error = metrics.accuracy_error(right, score.count)
        rows[f"task_accuracy_{side}{suffix}"] = (
            right / score.count,
            f"{right} of {score.count} right, standard error {100 * error:.1f} points",
        )
    rows[f"task_accuracy_drop{suffix}"] = (
        (score.reference_right - score.candidate_right) / score.count,
        f"{score.reference_right} right before, {score.candidate_right} now of {score.count}: "
        f"{score.lost} lost, {score.gained} gained",
    )
    return rows


def _worst(results: Sequence[CaseResult], key: Callable[[CaseResult], float]) -> CaseResult:
    return max(results, key=lambda case: _nan_last(key(case)))


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value
