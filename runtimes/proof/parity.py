"""Parity: a candidate session against what the reference says of the same cases, as rows with thresholds.

Three looks per case. Teacher forcing: the forced ids of prompt and answer go through the candidate, with captures.
Parts: vision tower and embeddings alone, the embeddings with seeded features in the pictures' places, so that an error
shows where it arises. Answers: generated token by token, or, where the reference's are `forced`, read off the top
tokens of the forced pass. Where it is asked for, they go through once more with given routing (`given_routing.py`). The
first case is read as an app reads it, too (`served.py`).
The reference is a record (`record.py`), which needs no PyTorch, or a checkpoint's own model.
B=1, S prompt and answer tokens, H hidden, V vocabulary, M image placeholder tokens, k experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from arriero.errors import ArrieroError
from arriero.runtimes.proof import metrics
from arriero.runtimes.proof.cases import Reference, ReferenceCase, answer_limit
from arriero.runtimes.proof.given_routing import GivenRouting
from arriero.runtimes.proof.logits import KlSums, LogitFigures
from arriero.runtimes.proof.report import CaseResult, ParityReport
from arriero.runtimes.proof.rtn_baseline import with_rtn_baseline
from arriero.runtimes.proof.served import keep_rows, served_kl, served_positions
from arriero.runtimes.proof.shared_steps import Forced, forced_cases
from arriero.runtimes.proof.sketch import seeded_features
from arriero.runtimes.proof.tally import Tally
from arriero.runtimes.steps import NotFinite, check_finite
from arriero.thresholds import OVER_RTN, check_thresholds

if TYPE_CHECKING:
    from arriero.runtimes.backend import Floats, Ints, ModelSpec
    from arriero.runtimes.processor.processor import Prompt
    from arriero.runtimes.session import Session


def measure(
    candidate: Session,
    reference: Reference,
    thresholds: Mapping[str, float],
    progress: Callable[[int, int, str], None] | None = None,
    near_tie: float = metrics.NEAR_TIE,
    rtn_kl: KlSums | None = None,
    forced_routing: bool = False,
    exact: Session | None = None,
    together: int | None = None,
) -> ParityReport:
    """Every row of the parity report; `progress(done, total, case name)` is called after each case.

    `near_tie` is the margin below which a choice of the reference counts as open: in logits for tokens, in router
    logits for experts. `rtn_kl`: KL of the RTN baseline against the same reference, which only a build can measure;
    None for a profile that does not calibrate. With `forced_routing` the candidate runs once more with the reference's
    routing, and `exact`, a session of the exact model, with the candidate's. Cases of `together` tokens are read in one
    step, see `forced_cases`. A threshold on something that could not be measured fails. Raises ArrieroError for unknown
    thresholds, no cases, models that are not alike, and outputs that are not of the reference's shape.
    """
    check_thresholds(thresholds)
    if not len(reference):
        raise ArrieroError("no parity cases", expected="at least one", remedy="Give the parity set some samples")
    _check_specs(reference.spec, candidate.backend.spec)
    forced = GivenRouting(candidate, near_tie) if forced_routing else None
    rerouted = None if exact is None else GivenRouting(exact, near_tie)
    tally = Tally(reference.spec, reference.answers, near_tie, forced, rerouted)
    for done, forced_case in enumerate(forced_cases(candidate, reference, together, captures=True), 1):
        name = forced_case.case.case.name
        try:
            _run_case(tally, candidate, forced_case)
        except metrics.ShapesDiffer as error:
            raise ArrieroError(
                str(error),
                where=f"parity case {name}",
                remedy="The candidate is not of this model; rebuild it",
            ) from error
        if progress:
            progress(done, len(reference), name)
    report = tally.report({name: value for name, value in thresholds.items() if name != OVER_RTN})
    return report if rtn_kl is None else with_rtn_baseline(report, tally.kl, rtn_kl, thresholds)


def measure_kl(
    candidate: Session, reference: Reference, progress: Callable[[int, int], None], together: int | None = None
) -> KlSums:
    """KL(reference || candidate) in nats over every fed token of the cases, and nothing else. Raises NotFinite.

    Cases of `together` tokens are read in one step, see `forced_cases`.
    """
    total = KlSums()
    for done, figures in enumerate(compare_logits(candidate, reference, together), 1):
        total += figures.kl
        progress(done, len(reference))
    return total


def compare_logits(
    candidate: Session, cases: Iterable[ReferenceCase], together: int | None = None
) -> Iterator[LogitFigures]:
    """Figures of the candidate's logits over the tokens that are fed for each case. Raises NotFinite."""
    for forced in forced_cases(candidate, cases, together, captures=False):
        meter = forced.case.logits.meter(metrics.NEAR_TIE)
        for step in forced.steps:
            meter.add(check_finite(step.logits[0]))
        yield meter.figures()


def _run_case(tally: Tally, candidate: Session, forced: Forced) -> None:
    case, prompt = forced.case, forced.prompt
    if not _same_prompt(prompt, case):
        tally.different_prompts.append(case.case.name)
    _measure_parts(tally, candidate, case, prompt.pixel_values)
    proven = list[np.ndarray]()
    if not tally.results:  # the first case
        places = served_positions(case, candidate.context)
        forced = replace(forced, steps=keep_rows(forced.steps, places, proven))
    figures, tops, router_flips, routed = _compare(tally, forced)
    if proven:
        tally.served = served_kl(candidate, case, prompt, proven)
    for run, expert_ids in ((tally.forced, case.expert_ids), (tally.rerouted, routed)):
        if run is not None and run.why_not is None and expert_ids.keys() == case.expert_ids.keys():
            bad = run.run(case, prompt.pixel_values, expert_ids)
            if run is tally.forced:  # the other run's numbers are not the candidate's
                tally.count("logits with forced routing", bad)
    answers = _forced_answers if tally.answers == "forced" else _generated_answers
    texts, rights, prefix = answers(tally, candidate, case, prompt, tops)
    tally.results.append(
        CaseResult(
            name=case.case.name,
            family=case.case.family,
            tokens=len(case.fed_ids),
            image_tiles=0 if prompt.pixel_values is None else len(prompt.pixel_values),
            logits_relative_l2=figures.sums.relative_l2,
            logits_max_abs_error=figures.largest_error,
            kl_mean=figures.kl.mean,
            token_flips=figures.top.real_flips,
            router_flips=router_flips,
            greedy_prefix=prefix,
            expected=case.case.answer,
            reference_text=texts[0],
            candidate_text=texts[1],
            reference_right=rights[0],
            candidate_right=rights[1],
        )
    )


def _compare(tally: Tally, forced: Forced) -> tuple[LogitFigures, Ints, int | None, dict[int, Ints]]:
    """What the forced ids gave, piece by piece: figures of the logits, top tokens [S], choices of routers that changed.

    And the candidate's experts [S, k] of each MoE layer.
    """
    case, spec = forced.case, tally.spec
    logits, hiddens = case.logits.meter(tally.near_tie), {layer: one.meter() for layer, one in case.hiddens.items()}
    tops, routed = list[np.ndarray](), {layer: list[np.ndarray]() for layer in case.expert_ids}
    for step in forced.steps:
        tally.watch("logits", step.logits)
        logits.add(step.logits[0])
        tops.append(top_tokens(step.logits[0], spec.image_token_id))
        for layer, hidden in step.hiddens.items():
            tally.watch(f"layer {layer}", hidden)
            hiddens[layer].add(hidden)
        for layer, ids in step.expert_ids.items():
            routed[layer].append(ids[0])
    figures = logits.figures()
    tally.add_logits(figures, len(case.expected_ids))
    for layer, meter in hiddens.items():
        if layer in step.hiddens:
            tally.add_hidden(layer, meter.errors())
        else:
            tally.uncaptured.add(f"hidden.{layer}")
    flips: int | None = None
    chosen = {layer: np.concatenate(pieces) for layer, pieces in routed.items() if pieces}
    for layer, ids in case.expert_ids.items():
        if layer not in chosen:
            tally.uncaptured.add(f"expert_id.{layer}")
            continue
        agreed = metrics.router_agreement(ids, chosen[layer], case.margins.get(layer), tally.near_tie)
        tally.add_router(layer, agreed)
        flips = (flips or 0) + agreed.real_flips
    return figures, np.concatenate(tops), flips, chosen


Answers = tuple[
    tuple[str, str], tuple[bool | None, bool | None], float
]  # texts, rights, common prefix; reference first


def _generated_answers(tally: Tally, candidate: Session, case: ReferenceCase, prompt: Prompt, tops: Ints) -> Answers:
    """What both sides say, each on its own. A context too short for the reference's answer cuts both to its room."""
    limit = answer_limit(len(candidate.processor.tokenize(case.case.answer)))
    room = max(1, min(limit, candidate.context - len(prompt.input_ids)))
    text, ids = "", list[int]()
    try:
        said = candidate.generate(prompt, max_tokens=room)
        text, ids = said.text, said.token_ids
    except NotFinite:  # no answer; the report says how many values and in which layers
        tally.watch("answers", np.array([np.nan]))
    texts = case.generated_text, text
    prefix = metrics.common_prefix(case.generated_ids[:room], ids)
    return texts, (case.case.is_right(texts[0]), case.case.is_right(texts[1])), prefix


def _forced_answers(tally: Tally, candidate: Session, case: ReferenceCase, prompt: Prompt, tops: Ints) -> Answers:
    """How far the top tokens of both sides lead along the expected answer; right is who gets to its closing token."""
    spec, expected = candidate.spec, case.expected_ids
    start = case.prompt_tokens - 1
    paths = case.top_tokens[start:], tops[start:]
    reached = [_reached(path, expected, spec.eos_token_ids) for path in paths]
    texts = [
        candidate.processor.decode(path[: steps + 1]) for path, steps in zip(paths, reached, strict=True)
    ]  # with the token at which it leaves the answer, or the closing one
    rights = [bool(len(expected)) and steps == len(expected) for steps in reached]
    together = min(reached[0] + 1, len(paths[0]))  # up to where the reference itself leaves the answer
    same = paths[0][:together] == paths[1][:together]
    prefix = float(np.argmin(same)) / together if not same.all() else 1.0
    scored = bool(case.case.scorer)
    return (texts[0], texts[1]), (rights[0] if scored else None, rights[1] if scored else None), prefix


def top_tokens(logits: Floats, image_token: int | None) -> Ints:
    """The token that a greedy answer takes after each position of `logits` [S, V]: never an image placeholder."""
    tops = logits.argmax(-1)
    for row in np.flatnonzero(tops == image_token):  # for None of none
        other = logits[row].copy()
        other[image_token] = -np.inf
        tops[row] = other.argmax()
    return tops


def _reached(path: Ints, expected: Ints, closing: Sequence[int]) -> int:
    """How many of the `expected` ids the top tokens lead to; any closing token stands for the last."""
    for step, (token, want) in enumerate(zip(path.tolist(), expected.tolist(), strict=False)):
        if token != want and not (step == len(expected) - 1 and token in closing):
            return step
    return len(expected)


def _measure_parts(tally: Tally, candidate: Session, case: ReferenceCase, pixels: Floats | None) -> None:
    """Vision on the candidate's own pixels, embeddings on seeded features: [n, 3, h, w] -> [M, H] -> [1, S, H]."""
    if case.features is not None and pixels is not None:
        features = candidate.vision(pixels)
        tally.watch("image features", features)
        tally.vision += case.features.errors(features)
    embeds = candidate.embed(case.fed_ids[None], placeholder_features(case, candidate.spec))
    tally.watch("embeddings", embeds)
    tally.embeddings += case.embeddings.errors(embeds)


def placeholder_features(case: ReferenceCase, spec: ModelSpec) -> Floats:
    """The features f32 [M, H] that stand for the case's pictures where embeddings are looked at alone."""
    count = 0 if spec.image_token_id is None else int(np.sum(case.fed_ids == spec.image_token_id))
    return seeded_features(*case.feature_seed, count, spec.hidden_size)


def _same_prompt(prompt: Prompt, case: ReferenceCase) -> bool:
    """Whether the candidate's processor makes the reference's ids and pixels of the prompt, exactly."""
    if not np.array_equal(prompt.input_ids, case.forced_ids[: case.prompt_tokens]):
        return False
    if case.pixels is None or prompt.pixel_values is None:
        return case.pixels is None and prompt.pixel_values is None
    try:
        return case.pixels.errors(prompt.pixel_values).noise == 0.0
    except metrics.ShapesDiffer:
        return False


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
