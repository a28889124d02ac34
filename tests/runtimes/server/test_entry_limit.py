"""Lists of more entries than the context has tokens, and texts of more bytes, are refused by their length alone."""

from __future__ import annotations

from typing import Any

import pytest

from arriero.errors import ArrieroError
from arriero.runtimes.processor.chat_template import ChatTemplate
from arriero.runtimes.processor.processor import Processor
from arriero.runtimes.session import Session
from tests.runtimes.server.conftest import Served

CHAT, RESPONSES, MESSAGES, COMPLETIONS = "/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/completions"
MANY = [None] * 401  # the toy has a context of 400 tokens
USER: Any = {"role": "user", "content": "x"}
HALF = [{"role": "user", "content": [{"type": "text", "text": "x"}]}] * 201
LONG = "expected at most 400, the tokens of the context"


def block(**fields: Any) -> dict[str, Any]:
    return {"max_tokens": 1, "messages": [USER], **fields}


@pytest.mark.parametrize(
    ("path", "body", "sentence"),
    [
        (CHAT, {"messages": MANY}, f"messages brings the entries of the request to 401; {LONG}"),
        (CHAT, {"messages": [{"role": "user", "content": MANY}]}, f"messages[0].content brings the .* to 402; {LONG}"),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": MANY}]}, f"messages[0].tool_calls brings .*; {LONG}"),
        (CHAT, {"messages": HALF}, f"messages[199].content brings the entries of the request to 401; {LONG}"),
        (CHAT, {"messages": [USER], "tools": MANY}, f"tools brings the entries of the request to 402; {LONG}"),
        (CHAT, {"messages": [USER], "stop": [None] * 17}, "stop holds 17 texts; expected at most 16"),
        (
            CHAT,
            {"messages": [USER], "logit_bias": dict.fromkeys(map(str, range(10_001)))},
            "logit_bias holds 10,001 entries; expected at most 10,000",
        ),
        (RESPONSES, {"input": MANY}, f"input brings the entries of the request to 401; {LONG}"),
        (RESPONSES, {"input": [{"role": "user", "content": MANY}]}, f"input[0].content brings the .*; {LONG}"),
        (RESPONSES, {"input": [{"type": "function_call_output", "output": MANY}]}, f"input[0].output .*; {LONG}"),
        (RESPONSES, {"input": "x", "tools": MANY}, f"tools brings the entries of the request to 401; {LONG}"),
        (
            RESPONSES,
            {"input": "x", "tool_choice": {"type": "allowed_tools", "tools": MANY}},
            f"tool_choice brings the entries of the request to 401; {LONG}",
        ),
        (MESSAGES, block(messages=MANY), f"messages brings the entries of the request to 401; {LONG}"),
        (MESSAGES, block(messages=[{"role": "user", "content": MANY}]), f"messages[0].content brings .*; {LONG}"),
        (MESSAGES, block(system=MANY), f"system brings the entries of the request to 402; {LONG}"),
        (MESSAGES, block(tools=MANY), f"tools brings the entries of the request to 402; {LONG}"),
        (MESSAGES, block(stop_sequences=[None] * 17), "stop_sequences holds 17 texts; expected at most 16"),
        (COMPLETIONS, {"prompt": MANY}, f"prompt brings the entries of the request to 401; {LONG}"),
        (COMPLETIONS, {"prompt": [MANY]}, f"prompt brings the entries of the request to 401; {LONG}"),
        ("/tokenize", {"messages": MANY}, f"messages brings the entries of the request to 401; {LONG}"),
    ],
)
def test_long_lists_are_refused_by_their_length(served: Served, path: str, body: Any, sentence: str) -> None:
    start, _, end = sentence.partition(".*")
    with served.web() as web:
        answer = web.post(path, json=body)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert message.startswith(start), message
    assert end in message, message


def test_too_many_messages_or_tools_are_not_rendered(processor: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChatTemplate, "render", None)
    with pytest.raises(
        ArrieroError, match="the prompt has 750,000 messages, each of a token at least; expected at most"
    ):
        processor.encode([USER] * 750_000)
    with pytest.raises(ArrieroError, match="the prompt has 51 tools, each of a token at least; expected at most 50"):
        processor.encode([USER], tools=[{}] * 51, context=50)


TEXT = "x" * 1_000_000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [{"role": "user", "content": TEXT}]}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": TEXT}]}]}),
        (RESPONSES, {"input": TEXT}),
        (RESPONSES, {"input": "x", "instructions": TEXT}),
        (MESSAGES, block(messages=[{"role": "user", "content": TEXT}])),
        (MESSAGES, block(system=TEXT)),
        (COMPLETIONS, {"prompt": TEXT}),
        (COMPLETIONS, {"prompt": ["x", TEXT]}),
        ("/tokenize", {"prompt": TEXT}),
        ("/tokenize", {"messages": [{"role": "user", "content": TEXT}]}),
    ],
)
def test_a_huge_text_is_refused_before_its_tokens_are_made(
    served: Served, toy_session: Session, path: str, body: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, vocabulary = list[int](), toy_session.processor._vocabulary
    words = vocabulary._encoded
    monkeypatch.setattr(vocabulary, "_encoded", lambda text: seen.append(len(text)) or words(text))
    with served.web() as web:
        answer = web.post(path, json=body)
        short = web.post("/tokenize", json={"prompt": "hello"})
    assert answer.status_code == 400
    assert "characters are more than 400 tokens, the context" in answer.json()["error"]["message"]
    assert short.json()["count"] == 5
    assert max(seen) == 5
