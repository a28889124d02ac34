"""`measure` on a real toy reference: an honest candidate passes, each subtly wrong one fails by the row it should."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from types import MethodType

import numpy as np
import pytest
import torch

from arriero.errors import ArrieroError, Problems
from arriero.export.proof import reference_answer
from arriero.export.proof.live_reference import LiveReference
from arriero.export.proof.reference import TorchBackend
from arriero.graphs.ops import expert_dispatch
from arriero.runtimes.backend import StepOutput
from arriero.runtimes.processor.processor import Prompt
from arriero.runtimes.proof import parity
from arriero.runtimes.proof.cases import MAX_ANSWER_TOKENS
from arriero.runtimes.proof.metrics import kl_per_token
from arriero.runtimes.proof.parity import measure
from arriero.runtimes.proof.parity_case import ParityCase
from arriero.runtimes.proof.report import ParityReport
from arriero.runtimes.proof.sampling_error import mean_error
from arriero.runtimes.proof.scorers import SAME_ANSWER
from arriero.runtimes.session import Session
from arriero.thresholds import check_thresholds
from tests.toys import IMAGE_TOKEN, make_maverick_toy, make_scout_toy

# The float32 profile's promise. Every wrong candidate below is off by far more.
EXACT = {"router_agreement": 1.0, "same_top_token": 1.0, "logits_max_abs_error": 1e-4}


class ToyProcessor:
    """One character is one token; each image is one noise tile of four placeholders before the text."""

    def encode(self, prompt, images=(), **settings):
        ids = [1] + [IMAGE_TOKEN] * (4 * len(images)) + [ord(c) for c in prompt]
        tiles = [np.random.default_rng(seed).normal(size=(3, 32, 32)) for seed in images]
        return Prompt(np.array(ids, np.int64), np.stack(tiles).astype(np.float32) if tiles else None)

    def tokenize(self, text):
        return np.array([ord(c) for c in text], np.int64)

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(i) for i in ids)


class Wrapped:
    """A backend with one of its methods replaced."""

    def __init__(self, inner: TorchBackend, **methods) -> None:
        self.spec, self.piece, self.few_rows, self._inner = inner.spec, inner.piece, inner.few_rows, inner
        for name in ("vision", "embed", "new_cache", "forward", "close"):
            setattr(self, name, methods.get(name, getattr(inner, name)))


def session(backend, processor=None) -> Session:
    return Session(backend, processor or ToyProcessor())


@pytest.fixture(scope="module", autouse=True)
def known_length() -> Iterator[None]:
    """A toy never ends an answer: what it says in so many tokens is right, and nobody may say more."""
    with pytest.MonkeyPatch.context() as patch:
        for reads in (reference_answer, parity):
            patch.setattr(reads, "answer_limit", lambda _: MAX_ANSWER_TOKENS)
        yield


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Session:
    return session(TorchBackend(make_scout_toy(tmp_path_factory.mktemp("scout"), seed=3)))


@pytest.fixture(scope="module")
def cases(reference) -> list[ParityCase]:
    """Prompts over several chunks of 16, one with two images; right is what the reference answers, but for one."""
    prompts = [("recall", "the key of gate nine is blue; what opens gate nine?", ())]
    prompts += [
        ("arithmetic", "12 + 30 - 5 + 7 - 9 + 11 = ", ()),
        ("image", "which of the two has more corners?", (7, 8)),
    ]
    made = []
    for number, (family, text, images) in enumerate(prompts):
        answer = reference.generate(reference.encode(text, list(images)), max_tokens=MAX_ANSWER_TOKENS).text
        right = "no such answer" if number == 1 else answer
        made.append(ParityCase(f"{family}-{number}", family, text, images, right, SAME_ANSWER))
    return made


def run(reference: Session, candidate: Session, cases, thresholds=EXACT, *given, **named) -> ParityReport:
    return measure(candidate, LiveReference(reference, cases), thresholds, *given, **named)


def twin(reference: Session) -> TorchBackend:
    return TorchBackend.of(copy.deepcopy(reference.backend.model))


def row(report: ParityReport, name: str):
    return next(row for row in report.rows if row.metric == name)


def failed(report: ParityReport) -> set[str]:
    return {row.metric for row in report.failed}


def test_an_honest_candidate_passes_every_row(reference, cases):
    seen = []
    thresholds = {
        **EXACT,
        "logits_relative_l2": 1e-5,
        "logits_kl_mean": 1e-9,
        "layer_relative_l2_highest": 1e-5,
        "layer_snr_db_lowest": 100.0,
        "router_agreement_lowest": 1.0,
        "vision_relative_l2": 1e-6,
        "embeddings_relative_l2": 0.0,
        "greedy_prefix_length": 1.0,
        "task_accuracy_drop": 0.0,
        "task_accuracy_candidate.image": 1.0,
    }
    model = copy.deepcopy(reference.backend.model).float()  # the same numbers, wider
    report = run(reference, session(TorchBackend.of(model)), cases, thresholds, lambda *step: seen.append(step))
    assert not report.failed, failed(report)
    assert seen == [(1, 3, "recall-0"), (2, 3, "arithmetic-1"), (3, 3, "image-2")]
    assert [layer.attention for layer in report.layers] == ["chunked"] * 3 + ["global"]
    assert row(report, "task_accuracy_reference").value == pytest.approx(2 / 3)
    assert {score.family: score.reference_right for score in report.families} == {
        "recall": 1,
        "arithmetic": 0,
        "image": 1,
    }
    assert [case.image_tiles for case in report.cases] == [0, 0, 2]


def test_how_the_tokens_kl_is_spread_and_what_it_is_past_the_chunk_and_in_answers(reference, cases):
    backend = twin(reference)
    with torch.no_grad():
        backend.model.language_model.lm_head.weight += 0.02 * torch.randn(
            backend.model.language_model.lm_head.weight.shape, generator=torch.Generator().manual_seed(5)
        )
    candidate = session(backend)
    report = run(reference, candidate, cases, {})
    token_kl, answers_kl = [], []
    for case in LiveReference(reference, cases):
        pixels = reference.encode(case.case.prompt, list(case.case.images)).pixel_values
        both = [one.logits(case.fed_ids, pixels).logits[0] for one in (reference, candidate)]
        token_kl.append(kl_per_token(*both))
        prompt = len(reference.encode(case.case.prompt, list(case.case.images)).input_ids)
        answers_kl.append(token_kl[-1][prompt - 1 :])  # from the prompt's last token on
    every = np.concatenate(token_kl)
    chunk = reference.spec.attention_chunk_size
    expected = {
        "logits_kl_mean": every.mean(),
        "logits_kl_standard_error": mean_error(token_kl),
        "logits_kl_median": np.quantile(every, 0.5),
        "logits_kl_p99": np.quantile(every, 0.99),
        "logits_kl_p999": np.quantile(every, 0.999),
        "logits_kl_past_chunk": np.concatenate([one[chunk:] for one in token_kl]).mean(),
        "logits_kl_answers": np.concatenate(answers_kl).mean(),
    }
    assert {name: row(report, name).value for name in expected} == pytest.approx(expected, rel=1e-6)
    assert row(report, "logits_kl_past_chunk").detail.startswith(f"{sum(len(one) - chunk for one in token_kl)} tokens")
    assert row(report, "router_agreement").value == 1.0
    assert "standard error" not in row(report, "router_agreement").detail  # where no choice differs, none is known
    for name in ("logits_kl_median", "logits_kl_p99", "logits_kl_past_chunk", "logits_kl_answers", "same_top_token"):
        unit = "nat" if name.startswith("logits") else "points"
        assert re.search(rf"; ± \S+ {unit}, standard error over {len(cases)} cases$", row(report, name).detail), name


def test_a_limit_past_the_chunk_fails_where_no_case_is_so_long(reference, cases):
    short = [replace(cases[0], prompt="the key?", answer="")]
    found = row(run(reference, session(twin(reference)), short, {"logits_kl_past_chunk": 1.0}), "logits_kl_past_chunk")
    assert (found.status, found.value) == ("fail", None)
    assert "no case has more than 16 tokens" in found.detail


def score_on_the_output(moe, x):
    value, expert_id = moe.router(x).topk(moe.per_token, dim=-1)
    whole = torch.ones_like(value)
    routed = expert_dispatch(x, expert_id, whole, moe.experts.gate_up_proj, moe.experts.down_proj)
    return moe.shared_expert(x) + routed * value.sigmoid(), expert_id


def scores_of_one(moe, x):
    value, expert_id = moe.router(x).topk(moe.per_token, dim=-1)
    routed = expert_dispatch(x, expert_id, torch.ones_like(value), moe.experts.gate_up_proj, moe.experts.down_proj)
    return moe.shared_expert(x) + routed, expert_id


def no_shared_expert(moe, x):
    value, expert_id = moe.router(x).topk(moe.per_token, dim=-1)
    score = value.sigmoid()
    return expert_dispatch(x, expert_id, score, moe.experts.gate_up_proj, moe.experts.down_proj), expert_id


@pytest.mark.parametrize("wrong", [score_on_the_output, scores_of_one, no_shared_expert])
def test_a_wrong_expert_formula_fails(reference, cases, wrong):
    backend = twin(reference)
    for layer in backend.model.language_model.model.layers:
        layer.feed_forward.forward = MethodType(wrong, layer.feed_forward)
    report = run(reference, session(backend), cases)
    assert "logits_max_abs_error" in failed(report)
    assert row(report, "embeddings_relative_l2").value == 0.0, "the fault is not there"


def test_one_lost_expert_in_one_layer_fails_and_the_series_shows_the_layer(reference, cases):
    backend = twin(reference)
    experts = backend.model.language_model.model.layers[2].feed_forward.experts
    experts.down_proj.data = experts.down_proj.data.clone()
    experts.down_proj.data[1] = 0
    report = run(reference, session(backend), cases)
    assert "logits_max_abs_error" in failed(report)
    errors = [layer.relative_l2 for layer in report.layers]
    assert errors[:2] == [0.0, 0.0]
    assert errors[2] > 1e-3


def test_a_dropped_chunk_mask_fails(reference, cases):
    backend = twin(reference)
    for layer in backend.model.language_model.model.layers:
        layer.self_attn.layer = replace(layer.self_attn.layer, chunked=False)
    assert "logits_max_abs_error" in failed(run(reference, session(backend), cases))


def test_a_dropped_chunk_mask_is_not_seen_within_one_chunk(reference):
    """Why the cases above are longer than a chunk."""
    backend = twin(reference)
    for layer in backend.model.language_model.model.layers:
        layer.self_attn.layer = replace(layer.self_attn.layer, chunked=False)
    assert not run(reference, session(backend), [ParityCase("short", "x", "abc")], EXACT).failed


def test_a_fault_of_decode_alone_fails_by_the_greedy_rows(reference, cases):
    backend = twin(reference)

    def forward(embeds, positions, cache, index, captures=False):
        output = backend.forward(embeds, positions, cache, index, captures)
        return StepOutput(np.roll(output.logits, 1, axis=-1)) if positions.shape[1] == 1 and not captures else output

    limits = {**EXACT, "greedy_prefix_length": 1.0, "task_accuracy_drop": 0.01}
    report = run(reference, session(Wrapped(backend, forward=forward)), cases, limits)
    # two lost of three are too few to show a drop of more than a point, four lost of six are enough
    assert failed(report) == {"greedy_prefix_length", "served_kl_highest"}
    assert row(report, "task_accuracy_drop").value == pytest.approx(2 / 3)
    twice = run(reference, session(Wrapped(backend, forward=forward)), [*cases, *cases], limits)
    assert failed(twice) == {"greedy_prefix_length", "task_accuracy_drop", "served_kl_highest"}
    told = row(twice, "task_accuracy_drop").detail
    assert told.startswith("4 right before, 0 now of 6: 4 lost, 0 gained; a drop from ")
    assert "fails from 50.0 points on" in told


@pytest.mark.parametrize("wrong", ["prompts", "decode"])
def test_what_an_app_is_given_is_looked_at_where_answers_are_forced(reference, cases, wrong):
    """The forced pass has captures, an app's steps have none: what is wrong in these alone shows in one row."""
    backend = twin(reference)

    def forward(embeds, positions, cache, index, captures=False):
        output = backend.forward(embeds, positions, cache, index, captures)
        spoilt = not captures and (positions.shape[1] == 1) == (wrong == "decode")
        return StepOutput(output.logits + 20 * np.eye(1, output.logits.shape[-1], 7)) if spoilt else output

    honest, spoilt = (
        measure(session(one), LiveReference(reference, cases, "forced"), EXACT)
        for one in (backend, Wrapped(backend, forward=forward))
    )
    assert not failed(honest)
    assert row(honest, "served_kl_highest").value < 1e-9
    assert row(honest, "served_kl_highest").detail == "2 of the first case's tokens"
    assert failed(spoilt) == {"served_kl_highest"}


def test_images_merged_in_the_wrong_order_fail_by_the_embeddings(reference, cases):
    backend = twin(reference)
    candidate = session(Wrapped(backend, embed=lambda ids, features: backend.embed(ids, features[::-1])))
    report = run(reference, candidate, cases, {**EXACT, "embeddings_relative_l2": 1e-6, "vision_relative_l2": 1e-6})
    assert failed(report) >= {"embeddings_relative_l2", "logits_max_abs_error"}
    assert row(report, "vision_relative_l2").status == "pass"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["logits", "hidden", "vision", "answers"])
def test_one_value_that_is_not_finite_fails_even_without_thresholds(reference, cases, bad, where):
    backend = twin(reference)

    def forward(embeds, positions, cache, index, captures=False):
        output = backend.forward(embeds, positions, cache, index, captures)
        if where == "answers" and not captures:
            output.logits[0, -1, 5] = bad  # in steps that no capture sees
        elif where != "answers" and captures:
            target = output.logits if where == "logits" else output.hiddens[1]
            target[0, -1, 5] = bad
        return output

    def vision(pixels):
        features = backend.vision(pixels)
        features[0, 0] = bad
        return features

    wrong = {"vision": vision} if where == "vision" else {"forward": forward}
    report = run(reference, session(Wrapped(backend, **wrong)), cases, {})
    assert "nonfinite_values" in failed(report)
    again = ParityReport.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False)))
    assert repr(again) == repr(report), "NaN is never equal, but reads the same"


def test_another_tokenizer_fails(reference, cases):
    class Shifted(ToyProcessor):
        def encode(self, prompt, images=(), **settings):
            plain = super().encode(prompt, images)
            return Prompt(np.concatenate([plain.input_ids, [9]]), plain.pixel_values)

    report = run(reference, session(reference.backend, Shifted()), cases, {})
    assert failed(report) == {"same_prompt"}
    assert row(report, "same_prompt").detail == "differ: recall-0, arithmetic-1, image-2"


def test_a_threshold_on_what_was_not_measured_fails(reference, cases):
    blind = Wrapped(
        reference.backend, forward=lambda *a: StepOutput(reference.backend.forward(*a[:4], captures=False).logits)
    )
    limits = {
        "router_agreement": 0.5,
        "layer_snr_db_lowest": 1.0,
        "vision_relative_l2": 1.0,
        "task_accuracy_drop": 1.0,
        "task_accuracy_drop.recal": 1.0,
    }
    unscored = [replace(case, scorer="") for case in cases[:2]]
    report = run(reference, session(blind), unscored, limits)
    assert failed(report) == set(limits)
    assert row(report, "vision_relative_l2").detail == "not measured: no image cases"
    assert row(report, "router_agreement").detail == "not measured: no expert ids for layers [0, 1, 2, 3]"
    loose = run(reference, session(blind), unscored, {})
    assert not loose.failed
    assert row(loose, "router_agreement").status == "info"


def test_near_tie_routing_is_counted_apart(reference, cases):
    """A candidate that differs only where the reference's router is a near tie keeps full agreement."""
    case = cases[0]
    ids = np.concatenate([reference.processor.encode(case.prompt).input_ids, reference.processor.tokenize(case.answer)])
    with reference.backend.router_margins() as noted:
        reference.logits(ids, None, captures=True)
    margins = np.concatenate(noted[0])
    near_tie = float(np.nextafter(margins.min(), np.float32(1)))

    def flipped_at(position):
        def forward(embeds, positions, cache, index, captures=False):
            output = reference.backend.forward(embeds, positions, cache, index, captures)
            if captures:
                output.expert_ids[0][positions == position] += 1
            return output

        candidate = session(Wrapped(reference.backend, forward=forward))
        return run(reference, candidate, [case], EXACT, near_tie=near_tie)

    apart = flipped_at(margins.argmin())
    assert row(apart, "router_agreement").value == 1.0
    assert apart.layers[0].near_tie_flips == 1
    clear = flipped_at(margins.argmax())
    assert row(clear, "router_agreement").status == "fail"
    assert clear.layers[0].real_flips == 1


def test_mavericks_dense_layers_have_no_routers(tmp_path):
    backend = TorchBackend(make_maverick_toy(tmp_path / "maverick", seed=4))
    text = [ParityCase("text", "x", "a prompt that is longer than one chunk")]
    report = run(session(backend), session(backend), text, EXACT)
    assert not report.failed, failed(report)
    assert [layer.router_agreement for layer in report.layers] == [None, 1.0, None, 1.0]


def test_the_report_survives_json(reference, cases):
    report = replace(run(reference, session(twin(reference)), cases), labels={"bundle": "toy"})
    assert ParityReport.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False))) == report
    for broken in ({}, {"format": 1}, {**report.to_dict(), "rows": [{"metric": "x"}]}, []):
        with pytest.raises(ArrieroError, match="parity report"):
            ParityReport.from_dict(broken)


def test_unknown_thresholds_are_listed_with_the_nearest_name():
    with pytest.raises(ArrieroError, match=r"thresholds\.router_agrement: .* Did you mean 'router_agreement'\?"):
        check_thresholds({"router_agrement": 0.9})
    with pytest.raises(Problems, match="3 problems"):
        check_thresholds({"nonfinite_values": 3, "same_top_token": math.nan, "logits_kl_mean.recall": 0.1})
    check_thresholds({"task_accuracy_drop.recall": 0.01, **EXACT})


def test_what_cannot_be_compared_is_refused(reference, cases, tmp_path):
    with pytest.raises(ArrieroError, match="no parity cases"):
        run(reference, reference, [], {})
    other = session(TorchBackend(make_maverick_toy(tmp_path / "maverick", seed=4)))
    with pytest.raises(ArrieroError, match="num_local_experts is 128; expected 4"):
        run(reference, other, cases, {})
    short = Wrapped(reference.backend, vision=lambda pixels: reference.backend.vision(pixels)[:-1])
    with pytest.raises(ArrieroError, match=r"parity case image-2: shapes differ"):
        run(reference, session(short), cases[2:], {})
