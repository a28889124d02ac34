"""The official `anthropic` client against a server over the small model on each backend."""

from __future__ import annotations

import base64
import io
from typing import Any

import anthropic
import numpy as np
import pytest
from PIL import Image

import arriero
from arriero.runtimes.session import Session
from tests.runtimes.server.conftest import Serve, Served, let_say

HELLO: list[Any] = [{"role": "user", "content": "Hello there"}]
COLD = {"temperature": 0}  # which the client has no argument for


@pytest.fixture(params=["onnxruntime", "tvm"])
def small(request: pytest.FixtureRequest) -> Session:
    workshop = request.getfixturevalue("tvm_workshop" if request.param == "tvm" else "workshop")
    return arriero.load(workshop / "bundles" / "fp32", threads=2, batch=4)


def connect(served: Served, key: str = "none") -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=served.url, api_key=key, max_retries=0, timeout=120)


def test_answers_whole_and_streamed_are_the_sessions_own(serve: Serve, small: Session) -> None:
    client = connect(serve({"small": small}))
    file = io.BytesIO()
    shade = np.full((40, 60, 3), 30, np.uint8)
    Image.fromarray(shade).save(file, "PNG")
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(file.getvalue()).decode()}
    text = {"type": "text", "text": "What is it?"}
    shown: list[Any] = [{"role": "user", "content": [{"type": "image", "source": source}, text]}]
    system = [{"role": "system", "content": "Be brief."}]
    seen = [*system, {"role": "user", "content": [{"type": "image"}, text]}]
    for messages, own, images in ((HELLO, [*system, *HELLO], None), (shown, seen, [Image.fromarray(shade)])):
        expected = small.generate(own, images, max_tokens=9)
        fields: dict[str, Any] = {"model": "small", "max_tokens": 9, "messages": messages, "extra_body": COLD}
        answer = client.messages.create(system="Be brief.", **fields)
        counted = client.messages.count_tokens(model="small", messages=messages, system="Be brief.")
        assert counted.input_tokens == expected.prompt_tokens
        assert [block.text for block in answer.content] == [expected.text]
        assert answer.stop_reason == {"length": "max_tokens", "stop": "end_turn"}[expected.finish_reason]
        with client.messages.stream(system=[{"type": "text", "text": "Be brief."}], **fields) as stream:
            assert "".join(stream.text_stream) == expected.text
            final = stream.get_final_message()
        assert final.content[0].text == expected.text
        for usage in (answer.usage, final.usage):
            assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == expected.prompt_tokens
            assert usage.output_tokens == len(expected.token_ids)


# --- over the toy


def test_stop_sequences_are_named(served: Served, toy_session: Session) -> None:
    text = toy_session.generate(HELLO, max_tokens=40).text
    fields: dict[str, Any] = {"model": "toy", "max_tokens": 40, "messages": HELLO, "extra_body": COLD}
    answer = connect(served).messages.create(stop_sequences=["\0", text[9:12]], **fields)
    assert answer.content[0].text == text[: text.index(text[9:12])]
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", text[9:12])


def test_calls_of_tools_and_their_results_go_both_ways(served: Served, toy_session: Session, toy: Any) -> None:
    template = toy_session.processor._templates["default"]
    object.__setattr__(template.source, "text", template.source.text + "{# tools #}")
    tool: Any = {"name": "add", "description": "adds", "input_schema": {"type": "object", "properties": {}}}
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    prompt = len(toy_session.encode(HELLO, tools=[{"type": "function", "function": {"name": "add"}}]).input_ids)
    let_say(toy, toy_session, prompt, "[add(a=1)]")
    client = connect(served)
    fields: dict[str, Any] = {"model": "toy", "max_tokens": 40, "tools": [tool], "extra_body": COLD}
    answer = client.messages.create(messages=HELLO, **fields)
    assert client.messages.count_tokens(model="toy", messages=HELLO, tools=[tool]).input_tokens == prompt
    (use,) = answer.content
    assert (answer.stop_reason, use.name, use.input) == ("tool_use", "add", {"a": 1})
    with client.messages.stream(messages=HELLO, **fields) as stream:
        (streamed,) = stream.get_final_message().content
    assert (streamed.name, streamed.input) == ("add", {"a": 1})
    toy.forward = type(toy).forward.__get__(toy)
    result = [{"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": "3"}]}]
    said = {"role": "assistant", "content": [use.model_dump()]}
    talk: list[Any] = [*HELLO, said, {"role": "user", "content": result}]
    read: list[dict[str, Any]] = []
    encode = toy_session.encode
    toy_session.encode = lambda messages, **options: (read.extend(messages), encode("x"))[1]  # type: ignore[assignment]
    client.messages.create(messages=talk, **fields)
    assert [message["role"] for message in read] == ["user", "assistant", "tool"]
    assert read[1]["tool_calls"][0]["function"] == call["function"]
    assert read[2]["content"] == "3"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"messages": []}, "messages is empty"),
        ({"messages": [{"role": "system", "content": "x"}]}, r"messages\[0\].role is 'system'"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "expected text, image"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://a"}}]}
                ]
            },
            "this server fetches nothing",
        ),
        ({"tool_choice": {"type": "any"}}, "names none of the tools"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "thinking is not possible here"),
        ({"extra_body": {"stop": ["x"]}}, "stop is not known here"),
        ({"max_tokens": 4000}, "exceed the context"),
    ],
)
def test_what_cannot_be_answered_is_refused(served: Served, fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(anthropic.BadRequestError, match=sentence) as refused:
        connect(served).messages.create(**{"model": "toy", "messages": HELLO, "max_tokens": 5, **fields})
    assert refused.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]


def test_the_key_is_asked_for(serve: Serve, toy_session: Session) -> None:
    served = serve({"toy": toy_session}, api_key="right")
    fields: dict[str, Any] = {"model": "toy", "messages": HELLO, "max_tokens": 5}
    assert connect(served, "right").messages.create(**fields).usage.output_tokens == 5
    with pytest.raises(anthropic.AuthenticationError):
        connect(served, "wrong").messages.create(**fields)
    with pytest.raises(anthropic.NotFoundError, match="There is no model 'other'"):
        connect(served, "right").messages.create(**{**fields, "model": "other"})
