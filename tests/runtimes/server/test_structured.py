"""Forms and forced calls of tools over HTTP, by the official client."""

from __future__ import annotations

import json
import re
from typing import Any

import anthropic
import openai
import pytest

import arriero
from arriero.runtimes.session import Session
from tests.runtimes.server.conftest import Serve, Served
from tests.runtimes.server.test_anthropic import connect
from tests.runtimes.test_grammar import ADD, SCHEMA, check

HELLO: list[Any] = [{"role": "user", "content": "Hello there"}]


@pytest.fixture(params=["onnxruntime", "tvm"])
def served(request: pytest.FixtureRequest, serve: Serve) -> Served:
    workshop = request.getfixturevalue("tvm_workshop" if request.param == "tvm" else "workshop")
    session: Session = arriero.load(workshop / "bundles" / "fp32", threads=2, batch=4)
    template = session.processor._templates["default"]  # the small model's own takes no tools
    object.__setattr__(template.source, "text", template.source.text + "{# tools #}")
    return serve({"small": session})


@pytest.fixture
def client(served: Served) -> openai.OpenAI:
    return served.openai()


@pytest.fixture
def served_anthropic(served: Served) -> anthropic.Anthropic:
    return connect(served)


def test_answers_are_json_as_the_schema_has_it(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    for seed in range(3):
        fields: dict[str, Any] = {"messages": HELLO, "response_format": form, "max_tokens": 250, "seed": seed}
        whole = client.chat.completions.create(model="small", **fields).choices[0]
        chunks = client.chat.completions.create(model="small", stream=True, **fields)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
        check(arriero.Generation(whole.message.content, [], whole.finish_reason, 0, 0.0, 0.0))
    bad: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "bla"}}}
    with pytest.raises(openai.BadRequestError, match="json_schema cannot be enforced"):
        client.chat.completions.create(model="small", messages=HELLO, response_format=bad)
    extra: Any = {"structured_outputs": {"regex": "[0-9]{3}"}}
    answer = client.completions.create(model="small", prompt="x", max_tokens=9, extra_body=extra)
    assert re.fullmatch("[0-9]{3}", answer.choices[0].text)


def test_a_call_that_is_asked_for_is_always_a_valid_one(client: openai.OpenAI) -> None:
    other: Any = {"type": "function", "function": {"name": "now"}}
    named: Any = {"type": "function", "function": {"name": "add"}}
    called = set()
    for seed in range(4):
        for choice in ("required", named):
            fields: dict[str, Any] = {"messages": HELLO, "tools": [ADD, other], "tool_choice": choice, "seed": seed}
            fields |= {"temperature": 2, "max_tokens": 200, "parallel_tool_calls": False}
            answer = client.chat.completions.create(model="small", **fields).choices[0]
            assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
            (call,) = answer.message.tool_calls or ()
            called.add(call.function.name)
            arguments = json.loads(call.function.arguments)
            if call.function.name == "add":
                assert set(arguments) == {"a", "b"}
                assert 0 <= arguments["a"] <= 99
                assert arguments["b"] in (1, 2)
            else:
                assert (choice, arguments) == ("required", {})
            chunks = list(client.chat.completions.create(model="small", stream=True, **fields))
            (streamed,) = [chunk.choices[0].delta.tool_calls for chunk in chunks if chunk.choices[0].delta.tool_calls]
            assert streamed[0].function.arguments == call.function.arguments
    assert "add" in called


def test_several_calls_may_be_asked_for_at_once(client: openai.OpenAI, served_anthropic: anthropic.Anthropic) -> None:
    """Each of them is valid, whole and streamed, in both APIs; the small model draws one call, several, or a list."""
    counts = set()
    for seed in range(8):
        fields: dict[str, Any] = {"messages": HELLO, "tools": [ADD], "tool_choice": "required", "seed": seed}
        fields |= {"temperature": 1.5, "max_tokens": 800}
        message = client.chat.completions.create(model="small", **fields).choices[0].message
        calls = [json.loads(call.function.arguments) for call in message.tool_calls]
        assert all(set(call) == {"a", "b"} and 0 <= call["a"] <= 99 and call["b"] in (1, 2) for call in calls)
        counts.add(len(calls))
        chunks = list(client.chat.completions.create(model="small", stream=True, **fields))
        (streamed,) = [chunk.choices[0].delta.tool_calls for chunk in chunks if chunk.choices[0].delta.tool_calls]
        assert [json.loads(call.function.arguments) for call in streamed] == calls
        assert [call.index for call in streamed] == list(range(len(calls)))
    assert max(counts) > 1
    tool: Any = {"name": "add", "input_schema": ADD["function"]["parameters"]}
    for parallel in (True, False):
        choice: Any = {"type": "any", "disable_parallel_tool_use": not parallel}
        uses = served_anthropic.messages.create(
            model="small", messages=HELLO, max_tokens=800, tools=[tool], tool_choice=choice
        ).content
        assert {use.type for use in uses} == {"tool_use"}
        assert all(set(use.input) == {"a", "b"} for use in uses)
        assert parallel or len(uses) == 1
