"""The official `openai` client against servers over the small model on each backend: every feature that it asks for."""

from __future__ import annotations

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

import arriero
from arriero.runtimes.session import Session
from arriero.runtimes.steps import least_piece
from tests.runtimes.server.conftest import Serve, Served, let_say

HELLO: list[Any] = [{"role": "user", "content": "Hello there"}]


@pytest.fixture(params=["onnxruntime", "tvm"])
def small(request: pytest.FixtureRequest) -> Session:
    workshop = request.getfixturevalue("tvm_workshop" if request.param == "tvm" else "workshop")
    return arriero.load(workshop / "bundles" / "fp32", threads=2, batch=4)


def picture(shade: int) -> dict[str, Any]:
    file = io.BytesIO()
    Image.fromarray(np.full((40, 60, 3), shade, np.uint8)).save(file, "PNG")
    return {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()},
    }


def test_answers_are_the_sessions_own(serve: Serve, small: Session) -> None:
    """Whole and streamed, greedy and drawn, with stops, pictures and log-probabilities, all at once."""
    client = serve({"small": small}).openai()
    shown: list[Any] = [{"role": "user", "content": [picture(30), {"type": "text", "text": "What is it?"}]}]
    drawn = {"temperature": 0.7, "seed": 1, "top_p": 0.9, "presence_penalty": 1, "frequency_penalty": 0.5}
    drawn["max_tokens"] = 8
    cases: list[tuple[list[Any], dict[str, Any], dict[str, Any]]] = [
        (HELLO, {"temperature": 0, "max_tokens": 9}, {"temperature": 0.0, "max_tokens": 9}),
        (HELLO, {"seed": 5, "max_completion_tokens": 12}, {"temperature": 1.0, "seed": 5, "max_tokens": 12}),
        (HELLO, drawn, drawn),
        (
            HELLO,
            {"temperature": 0, "max_tokens": 5, "logit_bias": {"70": 100}},
            {"logit_bias": {70: 100}, "max_tokens": 5},
        ),
        (shown, {"temperature": 0, "max_tokens": 6}, {"temperature": 0.0, "max_tokens": 6}),
    ]
    pictures = [Image.fromarray(np.full((40, 60, 3), 30, np.uint8))]
    expected = []
    for messages, _, settings in cases:
        own = (
            messages
            if messages is HELLO
            else [{"role": "user", "content": [{"type": "image"}, shown[0]["content"][1]]}]
        )
        expected.append(small.generate(own, None if messages is HELLO else pictures, **settings))

    def ask(case: Any) -> Any:
        messages, fields, _ = case
        return client.chat.completions.create(model="small", messages=messages, **fields)

    def stream(case: Any) -> list[Any]:
        messages, fields, _ = case
        options: Any = {"include_usage": True}
        chunks = client.chat.completions.create(
            model="small", messages=messages, stream=True, stream_options=options, **fields
        )
        return list(chunks)

    with ThreadPoolExecutor(10) as pool:
        whole, streamed = pool.map(ask, cases), pool.map(stream, cases)
        for own, answer, chunks in zip(expected, whole, streamed, strict=True):
            (choice,) = answer.choices
            assert (choice.message.content, choice.finish_reason) == (own.text, own.finish_reason)
            counts = (own.prompt_tokens, len(own.token_ids), own.prompt_tokens + len(own.token_ids))
            for usage in (answer.usage, chunks[-1].usage):
                assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == counts
            *pieces, end, last = chunks
            assert last.choices == []
            assert pieces[0].choices[0].delta.role == "assistant"
            assert "".join(piece.choices[0].delta.content for piece in pieces) == own.text
            assert end.choices[0].finish_reason == own.finish_reason
            assert {chunk.id for chunk in chunks} == {chunks[0].id}
            assert answer.system_fingerprint == f"arriero-{small.identity[:12]}"


def test_log_probabilities_whole_and_streamed(serve: Serve, small: Session) -> None:
    client = serve({"small": small}).openai()
    own = small.generate(HELLO, max_tokens=6, logprobs=3)
    fields: dict[str, Any] = {
        "model": "small",
        "messages": HELLO,
        "max_tokens": 6,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 3,
    }
    whole = client.chat.completions.create(**fields).choices[0].logprobs.content
    chunks = client.chat.completions.create(stream=True, **fields)
    streamed = [entry for chunk in chunks for entry in (chunk.choices[0].logprobs or Empty).content]
    said = [entry for entry in own.logprobs or () if entry.in_text]
    assert said
    for entries in (whole, streamed):
        for entry, expected in zip(entries, said, strict=True):
            assert entry.token == small.processor.decode([expected.token_id], False)
            assert bytes(entry.bytes) == entry.token.encode()
            assert entry.logprob == pytest.approx(expected.logprob, abs=1e-5)
            assert [top.logprob for top in entry.top_logprobs] == pytest.approx([v for _, v in expected.top], abs=1e-5)


def test_log_probabilities_are_of_the_tokens_that_the_text_has(serve: Serve, small: Session) -> None:
    """Not of the one that closes it."""
    client, (closing, *_) = serve({"small": small}).openai(), small.spec.eos_token_ids
    chat: dict[str, Any] = {"model": "small", "messages": HELLO, "logprobs": True, "logit_bias": {str(closing): 100}}
    (choice,) = client.chat.completions.create(**chat).choices
    assert (choice.finish_reason, choice.message.content, choice.logprobs.content) == ("stop", "", [])
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(stream=True, **chat)]
    assert [chunk.logprobs for chunk in chunks] == [None] * len(chunks)
    fields: dict[str, Any] = {"model": "small", "prompt": "x", "logprobs": 1, "logit_bias": {str(closing): 100}}
    (text,) = client.completions.create(**fields).choices
    assert (text.finish_reason, text.text, text.logprobs) == ("stop", "", None)


class Empty:
    content: tuple[Any, ...] = ()


def test_several_answers_differ_repeat_and_read_the_prompt_once(serve: Serve, small: Session) -> None:
    client = serve({"small": small}).openai()
    fields: dict[str, Any] = {
        "model": "small",
        "messages": HELLO,
        "max_tokens": 10,
        "n": 3,
        "seed": 4,
        "temperature": 2,
    }
    first, again = (client.chat.completions.create(**fields) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert [choice.message.content for choice in again.choices] == texts
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(stream=True, **fields):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts
    assert first.usage.completion_tokens == 30
    assert first.usage.prompt_tokens == small.generate(HELLO, max_tokens=1).prompt_tokens
    # but for the rest that is read again, so that its sums have a prompt's order
    rest = least_piece(small.backend)
    assert again.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - rest
    assert small.stats().prefilled_tokens <= first.usage.prompt_tokens + 9 * rest  # ten answers


def test_completions_go_on_with_a_text_as_it_stands(serve: Serve, small: Session) -> None:
    client = serve({"small": small}).openai()
    bos = small.spec.bos_token_id
    ids = [bos, *small.processor.tokenize("Once upon a time").tolist()]
    expected = small.generate(arriero.runtimes.processor.processor.Prompt(np.array(ids)), max_tokens=7, logprobs=2)
    for prompt in ("Once upon a time", ids):
        answer = client.completions.create(model="small", prompt=prompt, max_tokens=7, temperature=0, logprobs=2)
        assert answer.choices[0].text == expected.text
        assert answer.choices[0].logprobs.token_logprobs == pytest.approx(
            [entry.logprob for entry in expected.logprobs or () if entry.in_text], abs=1e-5
        )
        assert answer.usage.prompt_tokens == len(ids)
    several = client.completions.create(model="small", prompt=["Once", "Twice"], max_tokens=3, temperature=0, n=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == several.choices[1].text
    chunks = list(
        client.completions.create(model="small", prompt="Once upon a time", max_tokens=7, temperature=0, stream=True)
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected.text
    assert chunks[-1].choices[0].finish_reason == expected.finish_reason


# --- over the toy


def test_models_are_bundles_and_their_adapters(served: Served) -> None:
    client = served.openai()
    assert [model.id for model in client.models.list()] == ["toy", "toy:pirate"]
    assert client.models.retrieve("toy:pirate").id == "toy:pirate"
    assert client.chat.completions.create(model="toy:pirate", messages=HELLO, max_tokens=2).model == "toy:pirate"
    for ask in (
        lambda: client.models.retrieve("other"),
        lambda: client.chat.completions.create(model="other", messages=HELLO),
    ):
        with pytest.raises(openai.NotFoundError, match=r"There is no model 'other'; expected one of toy, toy:pirate\."):
            ask()


def test_stops_end_an_answer(served: Served, toy_session: Session) -> None:
    client = served.openai()
    text = toy_session.generate(HELLO, max_tokens=40).text
    stop = text[10:13]
    answer = client.chat.completions.create(
        model="toy", messages=HELLO, max_tokens=40, temperature=0, stop=[stop, "\0"]
    )
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_calls_of_tools_are_calls_and_words_are_words(served: Served, toy_session: Session, toy: Any) -> None:
    """The toy says what it is told to; whole and streamed, in both of Llama 4's ways to write a call."""
    client = served.openai()
    tool: Any = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}

    processor = toy_session.processor
    template = processor._templates["default"]
    object.__setattr__(template.source, "text", template.source.text + "{# tools #}")
    prompt = len(toy_session.encode(HELLO, tools=[tool]).input_ids)
    fields: dict[str, Any] = {"model": "toy", "messages": HELLO, "tools": [tool], "temperature": 0}
    for text in ('[add(a=1, b="x")]', '{"type": "function", "name": "add", "parameters": {"a": 1, "b": "x"}}'):
        let_say(toy, toy_session, prompt, text)
        (choice,) = client.chat.completions.create(**fields).choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        (call,) = choice.message.tool_calls
        assert (call.function.name, call.function.arguments) == ("add", '{"a": 1, "b": "x"}')
        chunks = list(client.chat.completions.create(stream=True, **fields))
        assert not "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        (streamed,) = [chunk.choices[0].delta.tool_calls for chunk in chunks if chunk.choices[0].delta.tool_calls]
        assert (streamed[0].function.name, streamed[0].index) == ("add", 0)
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
    for text in ("It is 3.", "[no call]"):
        let_say(toy, toy_session, prompt, text)
        answer = client.chat.completions.create(**fields).choices[0]
        assert (answer.message.content, answer.message.tool_calls, answer.finish_reason) == (text, None, "stop")
        chunks = list(client.chat.completions.create(stream=True, **fields))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"messages": []}, "messages is empty"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\].content is no text"),
        ({"messages": [{"role": "captain", "content": "x"}]}, "there is no role 'captain'"),
        ({"messages": HELLO, "temperature": -1}, "temperature is -1"),
        ({"messages": HELLO, "temperature": "hot"}, "temperature is 'hot'; expected a number"),
        ({"messages": HELLO, "top_logprobs": 3}, "top_logprobs goes with logprobs only"),
        ({"messages": HELLO, "n": 9}, "n is 9; expected a whole number from 1 to 8"),
        ({"messages": HELLO, "max_tokens": 0}, "max_tokens is 0"),
        ({"messages": HELLO, "max_tokens": 4000}, "exceed the context; expected at most 400 tokens"),
        ({"messages": HELLO, "logit_bias": {"x": 1}}, "logit_bias has the entry 'x'"),
        ({"messages": HELLO, "logit_bias": {"999": 1}}, "logit_bias names the token 999"),
        ({"messages": HELLO, "stop": [""]}, "stop is no text"),
        ({"messages": HELLO, "stream_options": {"include_usage": True}}, "stream_options goes with stream only"),
        ({"messages": HELLO, "response_format": {"type": "xml"}}, "response_format.type is 'xml'; expected text, json"),
        ({"messages": HELLO, "response_format": {"type": "json_schema"}}, "response_format.json_schema has no schema"),
        (
            {"messages": HELLO, "tool_choice": "required"},
            "tool_choice is 'required'; expected none, auto, required or a",
        ),
        ({"messages": HELLO, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice names 'f'"),
        ({"messages": HELLO, "extra_body": {"max_token": 3}}, "max_token is not known here. Did you mean max_tokens?"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "path": "/etc/passwd"}]}]},
            "expected text or image",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "document", "path": "a.pdf"}]}]},
            "expected text or image",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a/b.png"}}]}
                ]
            },
            "this server fetches nothing",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///a.png"}}]}]},
            "this server fetches nothing",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}],
                    }
                ]
            },
            "holds no image that can be read",
        ),
    ],
)
def test_what_cannot_be_answered_is_refused_with_a_sentence(
    served: Served, fields: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=sentence) as refused:
        served.openai().chat.completions.create(model="toy", **fields)
    assert refused.value.type == "invalid_request_error"
