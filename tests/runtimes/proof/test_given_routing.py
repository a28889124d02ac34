"""Rounding and flipped routing told apart: candidates that are wrong in one alone, with PyTorch on both sides."""

from __future__ import annotations

import copy
from types import MethodType

import numpy as np
import pytest
import torch

from arriero.errors import ArrieroError
from arriero.export.proof.live_reference import LiveReference
from arriero.export.proof.reference import TorchBackend
from arriero.runtimes.processor.processor import Prompt
from arriero.runtimes.proof.given_routing import CANDIDATE_ROUTING_KL, FORCED_KL, ROUTING_SHARE
from arriero.runtimes.proof.metrics import kl_per_token
from arriero.runtimes.proof.parity import measure
from arriero.runtimes.proof.parity_case import ParityCase
from arriero.runtimes.proof.report import ParityReport
from arriero.runtimes.session import Session
from tests.toys import make_guard_toy, make_maverick_toy, make_scout_toy

BOTH = (FORCED_KL, ROUTING_SHARE)


class ToyProcessor:
    """One character is one token."""

    def encode(self, prompt, images=(), **settings):
        return Prompt(np.array([1, *map(ord, prompt)], np.int64), None)

    def tokenize(self, text):
        return np.array([ord(c) for c in text], np.int64)

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(i) for i in ids)


def session(backend) -> Session:
    return Session(backend, ToyProcessor())


@pytest.fixture(scope="module", params=[1, 2])
def exact(request, tmp_path_factory) -> Session:
    """A model of four experts, of which each token goes to one or to two."""
    folder = tmp_path_factory.mktemp(f"scout-{request.param}")
    return session(TorchBackend(make_scout_toy(folder, 3, vision=False, num_experts_per_tok=request.param)))


@pytest.fixture
def cases() -> list[ParityCase]:
    """Prompts over several chunks of 16."""
    texts = "the key of gate nine is blue; what opens gate nine?", "12 + 30 - 5 + 7 - 9 + 11 = "
    return [ParityCase(f"case-{number}", "recall", text, (), "blue", "") for number, text in enumerate(texts)]


def run(reference: Session, candidate: Session, cases, thresholds=None, **asked) -> ParityReport:
    return measure(candidate, LiveReference(reference, cases, "forced"), thresholds or {}, **asked)


def row(report: ParityReport, name: str):
    return next(row for row in report.rows if row.metric == name)


def twin(exact: Session) -> TorchBackend:
    return TorchBackend.of(copy.deepcopy(exact.backend.model).float())


def feed_forwards(backend):
    return [layer.feed_forward for layer in backend.model.language_model.model.layers]


def flipped(exact: Session) -> Session:
    """The exact model, whose routers choose by their logits and something else, and score by their logits alone."""

    def route(self, x):
        logits = self.router(x)
        ids = (logits + torch.tensor([0.0, 0.4, -0.4, 0.2])).topk(self.per_token, dim=-1).indices
        return ids, logits.gather(-1, ids).sigmoid()

    backend = twin(exact)
    for feed_forward in feed_forwards(backend):
        feed_forward.route = MethodType(route, feed_forward)
    return session(backend)


def rounded(exact: Session) -> Session:
    """The model with values that are off everywhere, routers' input too, so that some tokens go elsewhere."""
    backend, draw = twin(exact), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in backend.model.named_parameters():
            if weight.dim() > 1 and "router" not in name:
                weight += 0.1 * weight.std() * torch.randn(weight.shape, generator=draw)
    return session(backend)


def test_an_exact_candidate_has_no_kl_with_the_references_routing(exact, cases):
    report = run(exact, session(twin(exact)), cases, {FORCED_KL: 1e-9}, forced_routing=True)
    assert row(report, FORCED_KL).status == "pass"
    assert row(report, FORCED_KL).value < 1e-9


def test_flipped_routing_alone_is_all_of_the_kl(exact, cases):
    report = run(exact, flipped(exact), cases, forced_routing=True, exact=session(twin(exact)))
    whole = row(report, "logits_kl_mean").value
    assert whole > 1e-3
    assert row(report, "router_agreement").value < 0.9
    assert row(report, FORCED_KL).value < 1e-9
    assert row(report, ROUTING_SHARE).value == pytest.approx(1.0, abs=1e-6)
    assert row(report, CANDIDATE_ROUTING_KL).value == pytest.approx(whole, rel=1e-3)
    assert not report.failed


def test_rounding_is_what_an_independent_run_with_the_references_experts_says(exact, cases):
    candidate = rounded(exact)
    report = run(exact, candidate, cases, forced_routing=True, exact=exact)
    whole, forced = row(report, "logits_kl_mean").value, row(report, FORCED_KL).value
    assert row(report, "router_agreement").value < 1.0
    assert row(report, ROUTING_SHARE).value == pytest.approx(1 - forced / whole)
    assert 0 < row(report, CANDIDATE_ROUTING_KL).value < whole
    judged = copy.deepcopy(candidate.backend.model)
    kl, other_kl = [], []
    for case in LiveReference(exact, cases, "forced"):
        free = candidate.logits(case.fed_ids, None, captures=True)
        kl.append(kl_per_token(case.logits.values, forward(judged, case.fed_ids, case.expert_ids)))
        elsewhere = {layer: ids[0] for layer, ids in free.expert_ids.items()}
        logits = forward(copy.deepcopy(exact.backend.model), case.fed_ids, elsewhere)
        other_kl.append(kl_per_token(case.logits.values, logits))
    assert forced == pytest.approx(np.concatenate(kl).mean(), rel=1e-3)
    assert row(report, CANDIDATE_ROUTING_KL).value == pytest.approx(np.concatenate(other_kl).mean(), rel=1e-3)


def forward(model, ids, expert_ids):
    """The logits [S, V] of a model whose routers are told their ids."""

    def route(self, x):
        chosen = torch.from_numpy(self.chosen)
        return chosen, self.router(x).gather(-1, chosen).sigmoid()

    for layer, chosen in expert_ids.items():
        feed_forward = model.language_model.model.layers[layer].feed_forward
        feed_forward.chosen, feed_forward.route = chosen.copy(), MethodType(route, feed_forward)
    backend = TorchBackend.of(model)
    cache, steps = backend.new_cache(1, 256), np.arange(len(ids))
    embeds = backend.embed(ids[None], np.zeros((0, backend.spec.hidden_size), np.float32))
    return backend.forward(embeds, steps[None], cache, steps).logits[0]


def test_dense_layers_between_are_left_alone(tmp_path, cases):
    exact = session(TorchBackend(make_maverick_toy(tmp_path, 3)))
    report = run(exact, session(twin(exact)), cases, forced_routing=True, exact=exact)
    assert max(row(report, name).value for name in (FORCED_KL, CANDIDATE_ROUTING_KL)) < 1e-9


def test_a_dense_model_has_no_such_rows(tmp_path, cases):
    exact = session(TorchBackend(make_guard_toy(tmp_path, 3)))
    report = run(exact, session(twin(exact)), cases, forced_routing=True)
    assert not {row.metric for row in report.rows} & {*BOTH, CANDIDATE_ROUTING_KL}


class Closed:
    """A backend whose graphs take no expert ids, as those of older bundles."""

    def __init__(self, inner: TorchBackend) -> None:
        self.spec, self.piece, self.few_rows = inner.spec, inner.piece, inner.few_rows
        for name in ("vision", "embed", "new_cache", "forward", "close"):
            setattr(self, name, getattr(inner, name))


def test_what_takes_no_expert_ids_says_so_and_meets_no_threshold(exact, cases):
    closed = session(Closed(twin(exact)))
    report = run(exact, closed, cases, forced_routing=True)
    for name in BOTH:
        assert row(report, name).value is None
        assert "the graphs take no expert ids" in row(report, name).detail
    assert not report.failed
    report = run(exact, closed, cases, {FORCED_KL: 1.0}, forced_routing=True)
    assert [row.metric for row in report.failed] == [FORCED_KL]


def test_nothing_is_run_that_nobody_asked_for(exact, cases, monkeypatch):
    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr(TorchBackend, "forward_forced", never)
    report = run(exact, session(twin(exact)), cases)
    assert not {row.metric for row in report.rows} & {*BOTH, CANDIDATE_ROUTING_KL}
    report = run(exact, session(twin(exact)), cases, {FORCED_KL: 1.0})
    assert "--forced-routing" in row(report, FORCED_KL).detail
    assert row(report, FORCED_KL).status == "fail"


def test_experts_that_the_model_does_not_have_are_refused(exact):
    assert exact.backend.forces_routing
    from arriero.runtimes.forced_routing import forced_inputs

    with pytest.raises(ArrieroError, match="expert ids from 9 to 9"):
        forced_inputs(exact.spec, {0: np.full((1, 2, exact.spec.num_experts_per_tok), 9)}, 1, 2)


def test_numbers_that_are_not_finite_are_counted_and_never_pass(exact, cases, monkeypatch):
    backend = twin(exact)
    inner = backend.forward_forced
    monkeypatch.setattr(backend, "forward_forced", lambda *step: inner(*step) * np.float32("nan"))
    report = run(exact, session(backend), cases, forced_routing=True)
    assert {row.metric for row in report.failed} == {"nonfinite_values", FORCED_KL}
