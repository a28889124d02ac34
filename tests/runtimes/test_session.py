"""Sessions over the numpy toy: pieces, limits, stops, cancelling, batches, threads."""

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from inspect import signature
from typing import get_type_hints

import numpy as np
import pytest

from arriero.errors import ArrieroError
from arriero.runtimes.grammar import Form
from arriero.runtimes.processor.chat import ChatOptions
from arriero.runtimes.processor.processor import Processor, Prompt
from arriero.runtimes.sampling import Sampling, SamplingSettings
from arriero.runtimes.session import Session
from arriero.runtimes.settings import Limits, Output, Settings
from tests.runtimes.gate import Gate

IMAGE_TOKEN = 261


@pytest.fixture
def session(toy, processor):
    return Session(toy, processor, context=64, batch=3)


def test_prefill_pieces_keep_to_size_and_chunks_and_change_nothing(session, toy, monkeypatch):
    monkeypatch.setattr(toy, "piece", 5)
    ids = np.random.default_rng(0).integers(0, 256, 21)
    out = session.logits(ids, captures=True)
    assert toy.steps == [(1, 5), (1, 3), (1, 5), (1, 3), (1, 5)]
    embeds = toy.embed(ids[None], np.zeros((0, 16), np.float32))
    whole = toy.forward(embeds, np.arange(21)[None], toy.new_cache(1, 21), np.arange(21), captures=True)
    np.testing.assert_allclose(out.logits, whole.logits, atol=2e-4)
    np.testing.assert_allclose(out.hiddens[1], whole.hiddens[1], atol=2e-4)
    assert np.array_equal(out.expert_ids[0], whole.expert_ids[0])


def test_prefill_then_decode_is_logits(session):
    ids = np.random.default_rng(1).integers(0, 256, 12)
    expected = session.logits(ids).logits[0]
    state = session.prefill(Prompt(ids[:9]))
    np.testing.assert_allclose(state.logits, expected[8], atol=2e-4)
    for position in (9, 10, 11):
        np.testing.assert_allclose(session.decode(state, int(ids[position])), expected[position], atol=2e-4)


def test_greedy_answers_are_the_argmax_chain(session):
    prompt = session.encode("hello")
    answer = session.generate("hello", max_tokens=12)
    ids = prompt.input_ids.tolist()
    for token in answer.token_ids:
        assert token == int(np.argmax(session.logits(np.array(ids)).logits[0, -1]))
        ids.append(token)
    assert answer.finish_reason == "length"
    assert answer.prompt_tokens == len(prompt.input_ids)
    assert answer.text == session.processor.decode(answer.token_ids)
    assert answer.ttft_s > 0
    assert answer.decode_s > 0


def test_images_go_through_the_tower_once_however_many_pieces(session, toy, monkeypatch):
    images = [np.full((28, 28, 3), shade, np.uint8) for shade in (10, 200)]
    prompt = session.encode("compare", images)
    whole = session.logits(prompt.input_ids, prompt.pixel_values).logits
    monkeypatch.setattr(toy, "piece", 3)  # cuts inside an image's placeholders
    toy.images_seen = 0
    np.testing.assert_allclose(session.logits(prompt.input_ids, prompt.pixel_values).logits, whole, atol=2e-4)
    assert toy.images_seen == 1
    swapped = session.encode("compare", images[::-1])
    assert not np.allclose(session.logits(swapped.input_ids, swapped.pixel_values).logits, whole, atol=1e-2)


def test_streamed_pieces_join_to_the_answer(session):
    whole = session.generate("hello", max_tokens=30, temperature=2.0, seed=3)
    stream = session.generate("hello", stream=True, max_tokens=30, temperature=2.0, seed=3)
    with pytest.raises(ArrieroError, match="not finished"):
        _ = stream.result
    pieces = list(stream)
    assert "".join(pieces) == whole.text == stream.result.text
    assert stream.result.token_ids == whole.token_ids
    assert len(pieces) > 5


def test_a_seed_repeats_and_another_differs(session):
    draws = [session.generate("x", max_tokens=20, temperature=1.5, top_p=0.9, seed=s).token_ids for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_a_sampling_is_its_settings_by_name(session):
    settings = {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "seed": 1}
    by_name = session.generate("x", max_tokens=20, **settings)
    stream = session.generate("x", stream=True, max_tokens=20, sampling=Sampling(**settings))
    assert "".join(stream) == by_name.text
    (together,) = session.generate_batch(["x"], max_tokens=20, sampling=Sampling(**settings))
    assert together.token_ids == stream.result.token_ids == by_name.token_ids
    assert by_name.token_ids != session.generate("x", max_tokens=20).token_ids


def test_the_settings_by_name_are_the_fields_of_the_records():
    """Type checkers and editors read the one, `Sampling`, `Limits` and `Output` hold the other."""
    assert get_type_hints(SamplingSettings) == get_type_hints(Sampling)
    others = {field.name for record in (Limits, Output, Form) for field in fields(record)} | get_type_hints(
        ChatOptions
    ).keys()
    assert get_type_hints(Settings).keys() == get_type_hints(Sampling).keys() | others | {"sampling", "adapter"}
    encode = signature(Processor.encode, eval_str=True).parameters
    assert {name: encode[name].annotation for name in ChatOptions.__annotations__} == get_type_hints(ChatOptions)


def test_what_a_chat_template_takes_reaches_it(toy, bundle, tmp_path):
    shutil.copytree(bundle / "tokenizer", tmp_path / "t")
    template = "{{ tools[0].name }}{{ documents[0].text }}{% for m in messages %}{{ m.content }};{% endfor %}"
    (tmp_path / "t" / "chat_template.jinja").write_text(template)
    session = Session(toy, Processor(tmp_path / "t", toy.spec), context=64, batch=3)
    shown = {"tools": [{"name": "f"}], "documents": [{"text": "d"}], "continue_final_message": True}
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    prompt = session.encode(chat, **shown)
    assert session.processor.decode(prompt.input_ids) == "fda;b"
    expected = session.generate(prompt, max_tokens=5)
    assert session.generate(chat, max_tokens=5, **shown).token_ids == expected.token_ids
    stream = session.generate(chat, stream=True, max_tokens=5, **shown)
    assert "".join(stream) == expected.text
    batch = session.generate_batch([chat, chat], max_tokens=5, **shown)
    assert [answer.token_ids for answer in batch] == [expected.token_ids] * 2
    with pytest.raises(ArrieroError, match="there are images and tools and documents and continue_final_m"):
        session.encode(prompt, ["a.png"], **shown)


def test_stop_texts_end_the_answer_and_are_left_out(session):
    whole = session.generate("hello", max_tokens=30, temperature=1.0, seed=4).text
    stop = whole[9:12]
    cut = whole[: whole.index(stop)]
    stream = session.generate("hello", stream=True, max_tokens=30, temperature=1.0, seed=4, stop=["\0never\0", stop])
    assert "".join(stream) == cut == stream.result.text
    assert stream.result.finish_reason == "stop"
    half = whole[-1] + "\0"  # a stop text of which only the beginning comes is given in full at the end
    assert session.generate("hello", max_tokens=30, temperature=1.0, seed=4, stop=half).text == whole


def test_the_closing_token_ends_the_answer(session, toy):
    toy.weights.head[:, 257] = 0
    toy.forward = closing_after(toy.forward, 4)
    answer = session.generate("hello", max_tokens=30)
    assert answer.finish_reason == "stop"
    assert answer.token_ids[-1] == 257
    assert "eot" not in answer.text


def closing_after(forward, steps):
    """Make the closing token the likeliest one after some single-token steps."""
    counted = iter(range(10**6))

    def changed(*arguments, **named):
        out = forward(*arguments, **named)
        if arguments[0].shape[1] == 1 and next(counted) >= steps:
            out.logits[:, :, 257] = 1e6
        return out

    return changed


def test_image_placeholders_are_never_answered(session, toy):
    toy.weights.head[:, toy.spec.image_token_id] = 0
    forward = toy.forward

    def eager(*arguments, **named):
        out = forward(*arguments, **named)
        out.logits[:, :, toy.spec.image_token_id] = 1e6
        return out

    toy.forward = eager
    assert toy.spec.image_token_id not in session.generate("hello", max_tokens=5).token_ids


@pytest.mark.parametrize("after", [0, 3])
def test_cancelling_stops_soon(session, toy, after):
    cancel, gate = threading.Event(), Gate(toy)
    stream = session.generate("hello", stream=True, max_tokens=40, cancel=cancel)
    steps = -(-len(session.encode("hello").input_ids) // 8) + after + 3  # the engine does not wait for its reader
    gate.open(steps)
    for _ in range(after):
        next(stream)
    while gate.left():
        time.sleep(0.001)
    cancel.set()
    gate.open(1000)
    list(stream)
    assert stream.result.finish_reason == "cancelled"
    assert len(stream.result.token_ids) <= after + 5  # those let through, and the step that was on its way


def test_a_batch_answers_as_alone_while_rows_finish_apart(session, toy):
    prompts = ["a", "a longer prompt", "hello", "mid size", "x"]
    settings = {"temperature": 1.0, "seed": 7, "max_tokens": 25}
    stop = ["e", "t"]
    alone = [session.generate(prompt, stop=stop, **settings) for prompt in prompts]
    toy.steps.clear()
    together = session.generate_batch(prompts, stop=stop, **settings)
    for one, other in zip(alone, together, strict=True):
        assert (one.text, one.token_ids, one.finish_reason) == (other.text, other.token_ids, other.finish_reason)
    assert max(batch for batch, _ in toy.steps) == 3  # the session's batch, though five prompts came
    assert len({len(answer.token_ids) for answer in alone}) > 1


def test_a_cancelled_batch_ends(session):
    cancel = threading.Event()
    cancel.set()
    answers = session.generate_batch(["a", "b"], cancel=cancel)
    assert [answer.finish_reason for answer in answers] == ["cancelled", "cancelled"]
    assert session.generate_batch([]) == []


def test_threads_sharing_a_session_answer_as_alone(session):
    prompts = [f"prompt {i}" * (i % 3 + 1) for i in range(12)]
    alone = [session.generate(prompt, max_tokens=15).token_ids for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda prompt: session.generate(prompt, max_tokens=15).token_ids, prompts))
    assert together == alone


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"prompt": "x" * 100}, "exceed the context; expected at most 64 tokens together"),
        ({"prompt": "x", "max_tokens": 64}, "64 for the answer exceed the context"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens is 0"),
        ({"prompt": "x", "max_tokens": "3"}, "max_tokens is '3'; expected a whole number"),
        ({"prompt": "x", "max_tokens": 1.5}, "max_tokens is 1.5"),
        ({"prompt": "x", "temperature": -1.0}, "temperature is -1"),
        ({"prompt": "x", "temperature": None}, "temperature is None; expected a number"),
        ({"prompt": "x", "temperature": 1.0, "top_k": 1.5}, "top_k is 1.5; expected a whole number"),
        ({"prompt": "x", "temperature": 1.0, "seed": "a"}, "seed is 'a'"),
        ({"prompt": "x", "temperature": float("nan")}, "temperature is nan"),
        ({"prompt": "x", "top_k": 0}, "top_k is 0"),
        ({"prompt": "x", "top_p": 1.5}, "top_p is 1.5"),
        ({"prompt": "x", "stop": [""]}, "a stop text is empty"),
        ({"prompt": "x", "stop": None}, "a stop text is None; expected text"),
        ({"prompt": "x", "stop": ["a", 5]}, "a stop text is 5"),
        ({"prompt": "x", "max_token": 3}, "no setting max_token; expected one of .*Did you mean max_tokens"),
        ({"prompt": "x", "temp": 1.0}, "no setting temp; .*Did you mean temperature"),
        ({"prompt": "x", "qqq": 1}, "no setting qqq; expected one of .*Leave it out"),
        ({"prompt": "x", "sampling": {"seed": 1}}, "sampling is {'seed': 1}; expected a `Sampling`"),
        ({"prompt": "x", "sampling": None}, "sampling is None; expected a `Sampling`"),
        (
            {"prompt": "x", "sampling": Sampling(), "temperature": 1.0, "seed": 2},
            "temperature, seed and sampling both say how to choose a token. Leave sampling out",
        ),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": None}, "the prompt is a NoneType; expected a text"),
        ({"prompt": []}, "list of messages is empty"),
        ({"prompt": Prompt(np.zeros(0, np.int64))}, "the prompt has no tokens"),
        ({"prompt": Prompt(np.array([1, 999]))}, "not a flat list of known tokens"),
        ({"prompt": Prompt(np.array([IMAGE_TOKEN]))}, "hold 1 image placeholders and the images make 0"),
        (
            {"prompt": Prompt(np.array([1]), np.zeros((1, 3, 5, 5), np.float32))},
            r"shape \[1, 3, 5, 5\]; expected float32 tiles",
        ),
        ({"prompt": Prompt(np.array([1])), "images": ["a.png"]}, "there are images beside an encoded prompt"),
        ({"prompt": "x", "continue_final_message": "content"}, "continue_final_message is 'content'; expected True or"),
        ({"prompt": "x", "tool": []}, "no setting tool; .*Did you mean tools"),
    ],
)
def test_what_cannot_work_is_refused_with_a_sentence(session, toy, arguments, sentence):
    with pytest.raises(ArrieroError, match=sentence):
        session.generate(**arguments)
    assert toy.steps == []


def test_the_context_can_be_filled_to_its_last_token(session):
    length = len(session.encode("hello").input_ids)
    answer = session.generate("hello")
    assert len(answer.token_ids) == 64 - length
    state = session.prefill(Prompt(np.arange(63)))
    session.decode(state, 5)
    with pytest.raises(ArrieroError, match="context of 64 tokens is full"):
        session.decode(state, 5)
    with pytest.raises(ArrieroError, match="no image placeholder"):
        session.decode(session.prefill(Prompt(np.arange(3))), session.spec.image_token_id)


def test_a_closed_session_says_so_and_may_be_closed_again(session, toy):
    forward, steps = toy.forward, threading.Semaphore(10)

    def held_up(*arguments, **named):
        steps.acquire(timeout=0.2)  # the answer is not over before the session is
        return forward(*arguments, **named)

    toy.forward = held_up
    state, stream = session.prefill("hello"), session.generate("hello", stream=True, max_tokens=40)
    next(stream)
    session.close()
    with pytest.raises(ArrieroError, match="the session is closed"):
        list(stream)
    session.close()
    for use in (
        lambda: session.generate("hello"),
        lambda: session.generate_batch(["hello"]),
        lambda: session.decode(state, 5),
        lambda: session.logits(np.arange(3)),
    ):
        with pytest.raises(ArrieroError, match="the session is closed"):
            use()
