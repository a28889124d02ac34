"""The official `openai` client against /v1/responses over the small model on each backend."""

from __future__ import annotations

import base64
import io
import json
from typing import Any, Literal

import numpy as np
import openai
import pytest
from PIL import Image
from pydantic import BaseModel

import arriero
from arriero.runtimes.session import Session
from tests.runtimes.gate import Gate
from tests.runtimes.server.conftest import Serve, Served, let_say
from tests.runtimes.test_grammar import ADD as tool

HELLO: list[Any] = [{"role": "user", "content": "Hello there"}]
ADD: Any = {"type": "function", **tool["function"], "strict": True}
LOGPROBS: Any = ["message.output_text.logprobs"]


class Answer(BaseModel):
    colour: Literal["red", "blue"]
    sure: bool


@pytest.fixture(params=["onnxruntime", "tvm"])
def small(request: pytest.FixtureRequest) -> Session:
    workshop = request.getfixturevalue("tvm_workshop" if request.param == "tvm" else "workshop")
    session = arriero.load(workshop / "bundles" / "fp32", threads=2, batch=4)
    take_tools(session)
    return session


def take_tools(session: Session) -> None:
    template = session.processor._templates["default"]  # the small model's own takes no tools
    object.__setattr__(template.source, "text", template.source.text + "{# tools #}")


def test_answers_whole_and_streamed_are_the_sessions_own(serve: Serve, small: Session) -> None:
    client = serve({"small": small}).openai()
    shade = np.full((40, 60, 3), 30, np.uint8)
    file = io.BytesIO()
    Image.fromarray(shade).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    parts = [{"type": "input_image", "image_url": url, "detail": "auto"}, {"type": "input_text", "text": "What is it?"}]
    shown: list[Any] = [{"role": "user", "content": parts}]
    system = {"role": "system", "content": "Be brief."}
    seen = [system, {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    cases: list[tuple[Any, list[Any], Any]] = [
        ("Hello there", [system, *HELLO], None),
        (HELLO, [system, *HELLO], None),
        (shown, seen, [Image.fromarray(shade)]),
    ]
    for said, own, images in cases:
        expected = small.generate(own, images, max_tokens=9, logprobs=2)
        fields: dict[str, Any] = {"model": "small", "input": said, "instructions": "Be brief.", "temperature": 0}
        fields |= {"max_output_tokens": 9, "include": LOGPROBS, "top_logprobs": 2}
        whole = client.responses.create(**fields)
        events = list(client.responses.create(stream=True, **fields))
        with client.responses.stream(**fields) as stream:
            streamed = list(stream)
        deltas = [event.delta for event in streamed if event.type == "response.output_text.delta"]
        assert "".join(deltas) == expected.text
        assert [event.sequence_number for event in events] == list(range(len(events)))
        status = {"length": "incomplete", "stop": "completed"}[expected.finish_reason]
        kinds = [event.type.removeprefix("response.") for event in events]
        ends = ["output_text.done", "content_part.done", "output_item.done", status]
        assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
        assert kinds[-4:] == ends
        for answer in (whole, events[-1].response, streamed[-1].response):
            assert (answer.output_text, answer.status, answer.store) == (expected.text, status, False)
            assert (answer.incomplete_details is not None) == (status == "incomplete")
            (entry,) = answer.output[0].content
            assert [one.logprob for one in entry.logprobs] == pytest.approx(
                [one.logprob for one in expected.logprobs or () if one.in_text], abs=1e-5
            )
            assert [len(one.top_logprobs) for one in entry.logprobs] == [2] * len(entry.logprobs)
            usage = answer.usage
            assert usage.input_tokens == expected.prompt_tokens
            assert usage.output_tokens == len(expected.token_ids)
            assert usage.total_tokens == usage.input_tokens + usage.output_tokens
            assert 0 < usage.input_tokens_details.cached_tokens < usage.input_tokens


def test_answers_are_parsed_as_their_schema_has_it(serve: Serve, small: Session) -> None:
    client = serve({"small": small}).openai()
    for seed in range(3):
        fields: dict[str, Any] = {"model": "small", "input": "Which?", "extra_body": {"seed": seed}}
        parsed = client.responses.parse(text_format=Answer, **fields).output_parsed
        assert isinstance(parsed, Answer)
        with client.responses.stream(text_format=Answer, **fields) as stream:
            assert stream.get_final_response().output_parsed == parsed
    bad: Any = {"format": {"type": "json_schema", "name": "x", "schema": {"type": "bla"}}}
    with pytest.raises(openai.BadRequestError, match="json_schema cannot be enforced"):
        client.responses.create(model="small", input="Which?", text=bad)
    answer = client.responses.create(
        model="small", input="x", text={"format": {"type": "json_object"}}, max_output_tokens=300
    )
    assert answer.status == "incomplete" or isinstance(json.loads(answer.output_text), dict)


def test_a_call_that_is_asked_for_is_always_a_valid_one(serve: Serve, small: Session) -> None:
    client = serve({"small": small}).openai()
    now: Any = {"type": "function", "name": "now"}
    only: Any = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "add"}]}
    for seed in range(3):
        for choice in ({"type": "function", "name": "add"}, only):
            fields: dict[str, Any] = {"model": "small", "input": "Hello", "tools": [ADD, now], "tool_choice": choice}
            fields |= {"parallel_tool_calls": False, "temperature": 2, "extra_body": {"seed": seed}}
            (call,) = client.responses.create(**fields).output
            assert (call.type, call.name) == ("function_call", "add")
            arguments = json.loads(call.arguments)
            assert set(arguments) == {"a", "b"}
            assert 0 <= arguments["a"] <= 99
            with client.responses.stream(**fields) as stream:
                events = list(stream)
            (done,) = [one for one in events if one.type == "response.function_call_arguments.done"]
            (streamed,) = events[-1].response.output
            assert done.arguments == streamed.arguments == call.arguments
            assert streamed.status == "completed"


# --- over the toy


def test_calls_of_tools_and_their_results_go_both_ways(served: Served, toy_session: Session, toy: Any) -> None:
    take_tools(toy_session)
    functions = [{"type": "function", "function": {"name": name, "description": ""}} for name in ("add", "now")]
    for function in functions:
        function["function"] |= {"parameters": {"type": "object", "properties": {}}}  # type: ignore[operator]
    prompt = len(toy_session.encode(HELLO, tools=functions).input_ids)
    let_say(toy, toy_session, prompt, "[add(a=1), now()]")
    client = served.openai()
    tools: list[Any] = [{"type": "function", "name": name} for name in ("add", "now")]
    fields: dict[str, Any] = {"model": "toy", "tools": tools, "temperature": 0}
    answer = client.responses.create(input=HELLO, **fields)
    assert [(call.name, json.loads(call.arguments)) for call in answer.output] == [("add", {"a": 1}), ("now", {})]
    (first,) = client.responses.create(input=HELLO, parallel_tool_calls=False, **fields).output
    assert first.name == "add"
    with client.responses.stream(input=HELLO, **fields) as stream:
        streamed = stream.get_final_response()
    assert [call.name for call in streamed.output] == ["add", "now"]
    toy.forward = type(toy).forward.__get__(toy)
    results = [{"type": "function_call_output", "call_id": call.call_id, "output": "3"} for call in answer.output]
    said = [*HELLO, *(call.model_dump(exclude_none=True) for call in answer.output), *results]
    read: list[dict[str, Any]] = []
    encode = toy_session.encode
    toy_session.encode = lambda messages, **options: (read.extend(messages), encode("x"))[1]  # type: ignore[assignment]
    again = client.responses.create(input=said, **fields)
    assert [message["role"] for message in read] == ["user", "assistant", "tool", "tool"]
    assert [call["function"]["name"] for call in read[1]["tool_calls"]] == ["add", "now"]
    assert [message["tool_call_id"] for message in read[2:]] == [call.call_id for call in answer.output]
    client.responses.create(input=[*HELLO, *again.model_dump()["output"], *HELLO], **fields)
    assert [message["role"] for message in read[4:]] == ["user", "assistant", "user"]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"store": True}, "store is True; this server keeps no responses"),
        ({"previous_response_id": "resp_1"}, "send the earlier items in `input`"),
        ({"conversation": "conv_1"}, "this server keeps no conversations"),
        ({"background": True}, "background is True"),
        ({"truncation": "auto"}, "truncation is 'auto'"),
        ({"input": []}, "input is no text"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, r"input\[0\].type is 'item_reference'; expected message"),
        ({"input": [{"role": "captain", "content": "x"}]}, "role is 'captain'; expected user"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, r"content\[0\].type is 'input_file'"),
        ({"tools": [{"type": "web_search"}]}, "this server has no tools of its own"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice names 'f'"),
        ({"tool_choice": "required"}, "tool_choice is 'required'"),
        ({"include": ["file_search_call.results"]}, "include names 'file_search_call.results'"),
        ({"top_logprobs": 3}, "top_logprobs goes with message.output_text.logprobs"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type is 'xml'"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema is no schema"),
        ({"max_output_tokens": 0}, "max_output_tokens is 0"),
        ({"max_output_tokens": 4000}, "exceed the context"),
        ({"extra_body": {"max_tokens": 3}}, "max_tokens is not known here"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://a/b.png"}]}]},
            "this server fetches nothing",
        ),
    ],
)
def test_what_cannot_be_answered_is_refused(served: Served, fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(openai.BadRequestError, match=sentence) as refused:
        served.openai().responses.create(**{"model": "toy", "input": "x", **fields})
    assert refused.value.type == "invalid_request_error"


def test_an_answer_that_fails_on_its_way_ends_as_failed(serve: Serve, toy_session: Session, toy: Any) -> None:
    served, gate = serve({"toy": toy_session}, request_seconds=0.5), Gate(toy)
    gate.open(5)
    try:
        events = list(served.openai().responses.create(model="toy", input="x", max_output_tokens=300, stream=True))
    finally:
        gate.open(10_000)
    assert events[-1].type == "response.failed"
    assert events[-1].response.status == "failed"
    assert "took longer" in events[-1].response.error.message
