"""Answers over the numpy toy: what ends them, what is shown and told of them, and what is no answer."""

from __future__ import annotations

import math

import numpy as np
import pytest

from arriero.errors import ArrieroError
from arriero.runtimes.processor.detokenize import Piece
from arriero.runtimes.processor.processor import Prompt
from arriero.runtimes.sampling import Sampling
from arriero.runtimes.session import Session
from arriero.runtimes.steps import NotFinite
from arriero.runtimes.stop_text import StopText
from tests.runtimes.conftest import ToyBackend

EOT, HEADER = 257, 258  # the toy's closing token, and a control token that closes nothing


@pytest.fixture
def session(toy, processor):
    return Session(toy, processor, context=64, batch=3)


def saying(session, toy, *tokens):
    """Let the toy answer "hello" with these tokens, one after another."""
    forward, prompt = ToyBackend.forward, len(session.encode("hello").input_ids)

    def changed(embeds, positions, cache, index, captures=False):
        out = forward(toy, embeds, positions, cache, index, captures)
        out.logits[...] = np.linspace(0, -1, out.logits.shape[-1])
        out.logits[..., tokens[max(int(cache.lengths[0]) - prompt, 0)]] = 50
        return out

    toy.forward = changed


def ids_of(session, text):
    return session.processor.tokenize(text).tolist()


def test_a_stop_text_that_is_a_special_token_ends_the_answer(session, toy):
    name = session.processor.decode([HEADER], skip_special_tokens=False)
    saying(session, toy, *ids_of(session, "ab"), HEADER, *ids_of(session, "cd"))
    answer = session.generate("hello", stop=[name], max_tokens=5)
    assert (answer.text, answer.finish_reason) == ("ab", "stop")
    assert answer.token_ids[-1] == HEADER


def test_a_stop_text_may_run_over_a_special_token(session, toy):
    name = session.processor.decode([HEADER], skip_special_tokens=False)
    saying(session, toy, *ids_of(session, "ab"), HEADER, *ids_of(session, "cd"))
    answer = session.generate("hello", stop=f"b{name}c", max_tokens=5)
    assert (answer.text, answer.finish_reason) == ("a", "stop")


def test_special_tokens_are_seen_where_they_are_asked_for(session, toy):
    name, eot = (session.processor.decode([token], skip_special_tokens=False) for token in (HEADER, EOT))
    for skip in (True, False):
        saying(session, toy, *ids_of(session, "añ"), HEADER, *ids_of(session, "d"), EOT)
        stream = session.generate("hello", stream=True, skip_special_tokens=skip, max_tokens=9)
        text = "".join(stream)
        assert text == stream.result.text == ("añd" if skip else f"añ{name}d{eot}")
        assert text == session.processor.decode(stream.result.token_ids, skip_special_tokens=skip)
        assert stream.result.finish_reason == "stop"


def test_a_stop_token_ends_the_answer_and_is_left_out_of_its_text(session, toy):
    a, b, c = ids_of(session, "abc")
    saying(session, toy, a, b, c)
    answer = session.generate("hello", stop_token_ids=[b], max_tokens=3)
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("a", [a, b], "stop")


def test_logprobs_say_whether_the_text_has_the_token(session):
    own = session.generate("hello", max_tokens=4, logprobs=0)
    assert [entry.in_text for entry in own.logprobs or ()] == [True] * 4
    last = own.token_ids[-1]
    assert last not in own.token_ids[:-1]
    stopped = session.generate("hello", max_tokens=9, logprobs=0, stop_token_ids=[last])
    assert [entry.in_text for entry in stopped.logprobs or ()] == [True] * 3 + [False]
    closing = session.spec.eos_token_ids[0]
    for skips in (True, False):
        closed = session.generate("hello", logprobs=0, logit_bias={closing: 100.0}, skip_special_tokens=skips)
        assert [(entry.token_id, entry.in_text) for entry in closed.logprobs or ()] == [(closing, not skips)]
        assert bool(closed.text) is not skips


def test_logprobs_tell_each_tokens_chance_and_the_likeliest(session):
    answer = session.generate("hello", max_tokens=4, logprobs=3, logit_bias={5: 100.0}, temperature=2.0, seed=1)
    assert answer.token_ids == [5] * 4
    ids = session.encode("hello").input_ids.tolist()
    assert answer.logprobs is not None
    for entry in answer.logprobs:
        logits = session.logits(np.array(ids)).logits[0, -1].astype(np.float64)
        expected = logits - math.log(np.exp(logits).sum())
        assert entry.token_id == 5
        assert entry.logprob == pytest.approx(expected[5], abs=1e-3)  # the model's own, without the bias
        assert [token for token, _ in entry.top] == np.argsort(-expected)[:3].tolist()
        np.testing.assert_allclose([value for _, value in entry.top], np.sort(expected)[::-1][:3], atol=1e-3)
        ids.append(entry.token_id)
    assert session.generate("hello", max_tokens=2).logprobs is None
    (alone,) = session.generate_batch(["hello"], max_tokens=4, logprobs=3, logit_bias={5: 100.0})
    assert [entry.token_id for entry in alone.logprobs or ()] == [5] * 4


def test_a_logits_processor_changes_a_greedy_answer(session, toy):
    saying(session, toy, *[65] * 4)
    assert session.generate("hello", max_tokens=4).token_ids == [65] * 4
    lowered = session.generate("hello", max_tokens=4, logits_processor=lambda _, logits: np.minimum(logits, 0.0))
    assert lowered.token_ids == [0] * 4


def step_by_step(session, count):
    state = session.prefill("hello")
    for _ in range(count):
        session.decode(state, 5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 1}, {"temperature": 1.0, "top_k": 5}])
@pytest.mark.parametrize("when", [0, 2])
def test_logits_that_are_not_finite_are_no_answer(session, toy, bad, settings, when):
    """At the prompt (0) and while decoding; of any token, also one that would never be chosen."""
    forward, calls = toy.forward, iter(range(10**6))

    def broken(*arguments, **named):
        out = forward(*arguments, **named)
        if next(calls) == when:
            out.logits[..., 17] = bad
        return out

    toy.forward = broken
    sentence = r"1 of 266 logits that are not finite, the first for token 17; .*arriero parity"
    with pytest.raises(NotFinite, match=sentence):
        session.generate("hello", max_tokens=5, **settings)
    calls = iter(range(10**6))
    with pytest.raises(NotFinite, match="token 17"):
        session.generate_batch(["hello", "x"], max_tokens=5, **settings)
    calls = iter(range(10**6))
    with pytest.raises(NotFinite):
        step_by_step(session, 3)


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        (Prompt(np.array([1, 999])), "not a flat list of known tokens"),
        (Prompt(np.array([-1])), "not a flat list of known tokens"),
        (Prompt(np.array([[1, 2]])), "not a flat list of known tokens"),
        (Prompt(np.array([1.5])), "not a flat list of known tokens"),
        (Prompt(None), "ids is None; expected an array of numbers"),
        (Prompt("abc"), "ids is 'abc'; expected an array"),
        (Prompt([[1], [2, 3]]), "ids is .*expected an array"),
        (Prompt(np.array([1]), "x"), "pixel_values is 'x'; expected an array"),
        (Prompt(np.array([1]), np.zeros((1, 3, 28, 28), np.float32)), "0 image placeholders and the images make"),
    ],
)
def test_a_stream_with_a_bad_prompt_is_refused_at_once(session, toy, prompt, sentence):
    with pytest.raises(ArrieroError, match=sentence):
        session.generate(prompt, stream=True, max_tokens=3)
    assert toy.steps == []
    assert toy.images_seen == 0


def test_a_prompt_of_plain_numbers_is_read(session):
    plain, arrays = (session.generate(Prompt(ids), max_tokens=5) for ids in ([1, 2, 3], np.array([1, 2, 3], np.int32)))
    assert plain.token_ids == arrays.token_ids


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"stop_token_ids": ["a"]}, "stop_token_ids holds 'a'; expected ids of tokens"),
        ({"stop_token_ids": 5.0}, "stop_token_ids holds 5.0"),
        ({"stop_token_ids": [266]}, "stop_token_ids names the token 266; expected an id below 266"),
        ({"logit_bias": {400: 1.0}}, "logit_bias names the token 400; expected an id below 266"),
        ({"logprobs": -1}, "logprobs is -1; expected a whole number of at least 0"),
        ({"logprobs": True}, "logprobs is True"),
        ({"logprobs": 300}, "logprobs is 300; expected at most 266"),
        ({"skip_special_tokens": "no"}, "skip_special_tokens is 'no'; expected True or False"),
        ({"cancel": "now"}, "cancel is 'now'; expected a `threading.Event`"),
        ({"sampling": Sampling(), "min_p": 0.1}, "min_p and sampling both say"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_runs(session, toy, settings, sentence):
    with pytest.raises(ArrieroError, match=sentence):
        session.generate("hello", stream=True, **settings)
    assert toy.steps == []


@pytest.mark.parametrize("token", ["x", 1.5, None, -1, 266, True])
def test_a_token_that_is_none_cannot_be_decoded(session, token):
    state = session.prefill("hello")
    with pytest.raises(ArrieroError, match="cannot be decoded; expected a known token"):
        session.decode(state, token)


def test_one_prompt_is_no_batch(session):
    with pytest.raises(ArrieroError, match="prompts is one prompt; expected a list"):
        session.generate_batch("hello")


def test_a_stop_text_is_the_same_however_its_text_comes():
    pieces = [Piece("ab"), Piece("<x>", special=True), Piece("cd<"), Piece("y>e")]
    for skip, shown in ((True, "abcd"), (False, "ab<x>cd")):
        text = StopText(("<y>",), skip)
        given = ""
        for piece in pieces:
            text.push(piece)
            given += "" if text.stopped else text.take()
        assert text.stopped
        assert given + text.rest() == shown
    held = StopText(("b<x>c",), True)
    for piece in pieces[:2]:
        held.push(piece)
    assert held.take() == "a"
    assert held.rest() == "b"
