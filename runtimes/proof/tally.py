"""The sums of a measurement over its cases, and the rows of the report that follow from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from arriero.runtimes.backend import ModelSpec
from arriero.runtimes.proof import metrics
from arriero.runtimes.proof.given_routing import CANDIDATE_ROUTING_KL, FORCED_KL, ROUTING_SHARE, GivenRouting
from arriero.runtimes.proof.logits import KlSums, LogitFigures
from arriero.runtimes.proof.metrics import Agreement, ErrorSums
from arriero.runtimes.proof.report import CaseResult, FamilyScore, LayerSeries, ParityReport
from arriero.runtimes.proof.sampling_error import mean_error, quantile_errors, ratio_error, told
from arriero.runtimes.proof.served import SERVED_KL
from arriero.runtimes.proof.value import Value
from arriero.thresholds import ALWAYS, FORCED, PER_FAMILY, AnswerMode


@dataclass
class Tally:
    """Sums over the cases of a candidate of model `spec`, whose answers and those of the reference are `answers`.

    `forced` is its run with the reference's routing, `rerouted` that of an exact model with the candidate's; None where
    nobody asked for them.
    """

    spec: ModelSpec
    answers: AnswerMode
    near_tie: float
    forced: GivenRouting | None = None
    rerouted: GivenRouting | None = None
    results: list[CaseResult] = field(default_factory=list)
    nonfinite: dict[str, int] = field(default_factory=dict)
    different_prompts: list[str] = field(default_factory=list)
    logits: ErrorSums = field(default_factory=ErrorSums)
    embeddings: ErrorSums = field(default_factory=ErrorSums)
    vision: ErrorSums = field(default_factory=ErrorSums)
    largest_error: float = 0.0
    kl: KlSums = field(default_factory=KlSums)
    token_kl: list[NDArray[np.float64]] = field(default_factory=list)  # of each case
    answers_kl: list[NDArray[np.float64]] = field(default_factory=list)  # of each case that expects an answer
    tops: list[Agreement] = field(default_factory=list)  # of each case
    hidden: dict[int, ErrorSums] = field(default_factory=dict)
    routers: dict[int, list[Agreement]] = field(default_factory=dict)  # of each layer, of each case
    uncaptured: set[str] = field(default_factory=set)
    served: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))  # KL of what an app is given, `served.py`

    def watch(self, what: str, array: np.ndarray) -> None:
        """Count the values of the candidate's `array` that are not finite."""
        self.count(what, int(array.size - np.isfinite(array).sum()))

    def count(self, what: str, bad: int) -> None:
        """Count so many values that are not finite."""
        if bad:
            self.nonfinite[what] = self.nonfinite.get(what, 0) + bad

    def add_logits(self, figures: LogitFigures, answer: int) -> None:
        """Add the logits of one case, whose last `answer` positions lead to the tokens of the expected answer."""
        self.logits, self.kl = self.logits + figures.sums, self.kl + figures.kl
        self.tops.append(figures.top)
        self.token_kl.append(figures.token_kl)
        if answer:
            self.answers_kl.append(figures.token_kl[-answer:])
        self.largest_error = float(np.maximum(self.largest_error, figures.largest_error))  # keeps a NaN

    def add_hidden(self, layer: int, errors: ErrorSums) -> None:
        """Add the residual stream after a layer."""
        self.hidden[layer] = self.hidden.get(layer, ErrorSums()) + errors

    def add_router(self, layer: int, agreement: Agreement) -> None:
        """Add the choices of a MoE layer's router in one case."""
        self.routers.setdefault(layer, []).append(agreement)

    def report(self, thresholds: Mapping[str, float]) -> ParityReport:
        """The report over everything added so far."""
        families = _families(self.results)
        values = {**self._whole(), **self._routing(), **self._parts(), **self._layers(), **self._tasks(families)}
        for name in thresholds:
            if name not in values:
                values[name] = Value(None, self._why_not(name, families))
        limits = {**ALWAYS, **thresholds}
        return ParityReport(
            rows=tuple(value.row(name, limits.get(name)) for name, value in values.items() if value.applies),
            layers=tuple(self._series()),
            families=families,
            cases=tuple(self.results),
            near_tie=self.near_tie,
            answers=self.answers,
        )

    def _why_not(self, name: str, families: Sequence[FamilyScore]) -> str:
        if name in (FORCED_KL, ROUTING_SHARE):
            return "nothing ran with forced routing, as `forced_routing: true` under `parity` or --forced-routing asks"
        other = {**FORCED, **{forced: generated for generated, forced in FORCED.items()}}
        if name.partition(".")[0] not in self._names(FORCED):
            if name.partition(".")[0] in other:
                return f"the reference's answers are {self.answers}"
            return "only a build can measure it"
        known = ", ".join(score.family for score in families) or "none"
        return f"no scored case of this family (scored families: {known})"

    def _names(self, names: Mapping[str, str]) -> list[str]:
        """The metrics of answers, as they are called for answers of this kind."""
        return list(names if self.answers == "generated" else names.values())

    def _whole(self) -> dict[str, Value]:
        cases = len(self.results)
        different = ", ".join(self.different_prompts[:5])
        worst_error = _worst(self.results, lambda case: case.logits_max_abs_error)
        worst_relative = _worst(self.results, lambda case: case.logits_relative_l2)
        worst_kl = _worst(self.results, lambda case: case.kl_mean)
        where_kl = f"{self.kl.tokens} tokens; worst case {worst_kl.name} at {worst_kl.kl_mean:.3g}"
        where_relative = f"worst case {worst_relative.name} at {worst_relative.logits_relative_l2:.3g}"
        return {
            "same_prompt": Value(
                1.0 - len(self.different_prompts) / cases, f"differ: {different}" if different else f"{cases} cases"
            ),
            "nonfinite_values": Value(
                float(sum(self.nonfinite.values())),
                "; ".join(f"{what}: {count}" for what, count in self.nonfinite.items()),
            ),
            SERVED_KL: Value(float(self.served.max()), f"{len(self.served)} of the first case's tokens"),
            "logits_max_abs_error": Value(self.largest_error, f"worst case {worst_error.name}"),
            "logits_relative_l2": Value(
                self.logits.relative_l2,
                f"SNR {self.logits.snr_db:.1f} dB; {where_relative}",
                self.logits.relative_l2_error,
            ),
            "logits_kl_mean": Value(self.kl.mean, where_kl, self.kl.error),
            "logits_kl_standard_error": Value(mean_error(self.token_kl), f"{cases} case{'s' * (cases != 1)}"),
            "logits_kl_lower_bound": Value(self.kl.bound_mean, f"{self.kl.tokens} tokens"),
            **self._spread(),
            "same_top_token": _agreed(self.tops),
        }

    def _routing(self) -> dict[str, Value]:
        """What flipped routing costs, where that was asked for."""
        values: dict[str, Value] = {}
        if not self._moe:
            return values
        if self.forced is not None:
            values[FORCED_KL] = self.forced.value()
            values[ROUTING_SHARE] = self.forced.share_of(self.kl, self.token_kl)
        if self.rerouted is not None:
            missing = self._unrouted()
            why = Value(None, f"no expert ids for layers {missing}")
            values[CANDIDATE_ROUTING_KL] = why if missing else self.rerouted.value()
        return values

    @property
    def _moe(self) -> list[int]:
        """The layers that route."""
        return [number for number, layer in enumerate(self.spec.layers) if layer.ffn == "moe"]

    def _unrouted(self) -> list[int]:
        """Those of which the candidate told no expert ids."""
        return [n for n in self._moe if f"expert_id.{n}" in self.uncaptured or n not in self.routers]

    def _spread(self) -> dict[str, Value]:
        """How the tokens' KL is spread; its mean in answers, and where chunked layers no longer see the beginning."""
        every, chunk = np.concatenate(self.token_kl), self.spec.attention_chunk_size
        late = [one[chunk:] for one in self.token_kl if len(one) > chunk]
        shares = {"logits_kl_median": 0.5, "logits_kl_p99": 0.99, "logits_kl_p999": 0.999}
        chunked = any(layer.attention == "chunked" for layer in self.spec.layers)
        past = Value(None, f"no case has more than {chunk} tokens", applies=chunked)
        if chunked and late:
            past = _mean_kl(late, f"tokens at positions from {chunk} on")
        answers = Value(None, "no case has an expected answer")
        if self.answers_kl:
            answers = _mean_kl(self.answers_kl, "tokens of expected answers, closing ones included")
        with np.errstate(invalid="ignore"):  # between infinite ones lies no number
            quantiles = np.quantile(every, [*shares.values()])
        errors: Sequence[float | None] = quantile_errors(self.token_kl, [*shares.values()]) or [None] * len(shares)
        spread = {
            name: Value(float(value), f"{len(every)} tokens" + told(error, len(self.token_kl), "nat"))
            for name, value, error in zip(shares, quantiles, errors, strict=True)
        }
        return spread | {"logits_kl_past_chunk": past, "logits_kl_answers": answers}

    def _parts(self) -> dict[str, Value]:
        unseen = Value(None, "no image cases")
        if self.spec.image_token_id is None:
            unseen = Value(None, "the model reads no images", applies=False)
        return {
            "vision_relative_l2": _part(self.vision) if self.vision.count > 0 else unseen,
            "embeddings_relative_l2": _part(self.embeddings),
        }

    def _layers(self) -> dict[str, Value]:
        moe, missing = self._moe, self._unrouted()
        wholes = self._routed()
        shares = {layer: share for layer, one in wholes.items() if (share := one.fraction) is not None}
        if not moe or missing:
            dense = Value(None, "the model has no MoE layers", applies=False)
            why = Value(None, f"no expert ids for layers {missing}") if missing else dense
            routers = {"router_agreement": why, "router_agreement_lowest": why}
        else:
            lowest = min(shares, key=lambda layer: shares[layer], default=None)
            by_case = [sum(ones, Agreement()) for ones in zip(*self.routers.values(), strict=True)]
            routers = {
                "router_agreement": _agreed(by_case, f"{len(moe)} layers: "),
                "router_agreement_lowest": Value(
                    None if lowest is None else shares[lowest],
                    "every choice is a near tie" if lowest is None else f"layer {lowest}: {wholes[lowest]}",
                ),
            }
        absent = [n for n in range(len(self.spec.layers)) if f"hidden.{n}" in self.uncaptured or n not in self.hidden]
        if absent:
            why = Value(None, f"no hidden states for layers {absent}")
            return routers | {"layer_relative_l2_highest": why, "layer_snr_db_lowest": why}
        worst = max(self.hidden, key=lambda layer: _nan_last(self.hidden[layer].relative_l2))
        sums = self.hidden[worst]
        return routers | {
            "layer_relative_l2_highest": Value(sums.relative_l2, f"layer {worst}", sums.relative_l2_error),
            "layer_snr_db_lowest": Value(sums.snr_db, f"layer {worst}", sums.snr_db_error),
        }

    def _tasks(self, families: Sequence[FamilyScore]) -> dict[str, Value]:
        prefix = sum(case.greedy_prefix for case in self.results) / len(self.results)
        whole = sum(case.greedy_prefix == 1.0 for case in self.results)
        (name,) = self._names({key: value for key, value in FORCED.items() if key not in PER_FAMILY})
        values = {name: Value(prefix, f"{whole} of {len(self.results)} answers equal to the last token")}
        accuracies = self._names({key: value for key, value in FORCED.items() if key in PER_FAMILY})
        if not families:
            return values | dict.fromkeys(accuracies, Value(None, "no case has a scorer and an answer"))
        total = FamilyScore(
            "",
            *(
                sum(getattr(score, name) for score in families)
                for name in ("count", "reference_right", "candidate_right", "lost", "gained")
            ),
        )
        for score in (total, *families):
            values |= _accuracy_values(score, accuracies)
        return values

    def _routed(self) -> dict[int, Agreement]:
        """The choices of each layer's router in all cases."""
        return {layer: sum(cases, Agreement()) for layer, cases in self.routers.items()}

    def _series(self) -> list[LayerSeries]:
        series, routed = [], self._routed()
        for number, layer in enumerate(self.spec.layers):
            hidden, router = self.hidden.get(number), routed.get(number)
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


def _agreed(cases: Sequence[Agreement], before: str = "") -> Value:
    """How often two sides chose alike in all `cases`."""
    whole = sum(cases, Agreement())
    error = ratio_error([case.real_flips for case in cases], [case.clear for case in cases])
    return Value(whole.fraction, before + str(whole) + told(error, len(cases), "share"))


def _mean_kl(cases: Sequence[NDArray[np.float64]], of: str) -> Value:
    """The mean over tokens of some of each case's, and its error."""
    tokens = np.concatenate(cases)
    return Value(float(tokens.mean()), f"{len(tokens)} {of}" + told(mean_error(cases), len(cases), "nat"))


def _part(sums: ErrorSums) -> Value:
    return Value(sums.relative_l2, f"SNR {sums.snr_db:.1f} dB", sums.relative_l2_error)


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


def _accuracy_values(score: FamilyScore, names: Sequence[str]) -> dict[str, Value]:
    """The three accuracies under their `names`: reference, candidate, drop."""
    reference, candidate, drop = (f"{name}.{score.family}" if score.family else name for name in names)
    values = {}
    for name, right in ((reference, score.reference_right), (candidate, score.candidate_right)):
        low, high = metrics.accuracy_interval(right, score.count)
        detail = f"{right} of {score.count} right; {100 * low:.1f} to {100 * high:.1f} % at 95 % confidence"
        values[name] = Value(right / score.count, detail)
    values[drop] = Value(
        score.pairs.drop,
        f"{score.reference_right} right before, {score.candidate_right} now of {score.count}: "
        f"{score.lost} lost, {score.gained} gained",
        pairs=score.pairs,
    )
    return values


def _worst(results: Sequence[CaseResult], key: Callable[[CaseResult], float]) -> CaseResult:
    return max(results, key=lambda case: _nan_last(key(case)))


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value
