"""Bodies that nobody would send: each is answered or refused, and none is a fault of the server."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from tests.runtimes.server.conftest import Served

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, 2**70, -(2**70), 0.5, -0.5, 1e308, 1e-308),
    *(
        "",
        "x",
        "\0",
        "\ud83d\ude00",
        "toy",
        "json_object",
        "auto",
        "required",
        "any",
        "tool",
        "data:image/png;base64,AA==",
    ),
    *([], [[]], [1], [266], [-1], ["x"], [None], [{}], {}, {"x": 1}, {"type": "text"}, {"type": "text", "text": "x"}),
    *({"5": 1}, {"-5": 1}, {"5": "x"}, {"type": "json_schema", "json_schema": {"schema": {}}}),
    *([{"role": "user", "content": "x"}], [{"role": "user", "content": [{"type": "text", "text": 3}]}]),
    *([{"role": "tool", "content": {"a": 1}}], [{"role": "assistant", "content": None, "tool_calls": [{}]}]),
    *([{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],),
    *([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}]}],),
    *([{"type": "function_call", "name": "f", "arguments": "{"}], [{"type": "function_call_output", "output": [3]}]),
    *([{"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,AA=="}]}],),
    *({"format": {"type": "json_schema", "schema": {}}}, {"type": "allowed_tools", "mode": "required", "tools": [{}]}),
    *([{"type": "function", "function": {"name": "f"}}], [{"name": "f", "input_schema": 3}], [{"name": "f"}]),
)
FIELDS = {
    "/v1/chat/completions": (
        *("messages", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "n", "seed"),
        *("frequency_penalty", "logit_bias", "stop", "max_tokens", "max_completion_tokens", "stream", "stream_options"),
        *("logprobs", "top_logprobs", "tools", "tool_choice", "response_format", "structured_outputs", "model", "user"),
    ),
    "/v1/completions": ("prompt", "logprobs", "echo", "suffix", "best_of", "n", "max_tokens", "stop", "stream", "seed"),
    "/v1/messages": (
        *("messages", "system", "max_tokens", "temperature", "top_k", "top_p", "stop_sequences", "stream", "tools"),
        *("tool_choice", "thinking", "metadata", "model"),
    ),
    "/v1/messages/count_tokens": ("messages", "system", "tools", "tool_choice", "thinking", "model"),
    "/v1/responses": (
        *("input", "instructions", "max_output_tokens", "text", "tools", "tool_choice", "parallel_tool_calls", "store"),
        *("include", "top_logprobs", "metadata", "stream", "stream_options", "truncation", "reasoning", "model"),
    ),
    "/tokenize": ("prompt", "messages", "model"),
}
GOOD: dict[str, Any] = {"model": "toy", "max_tokens": 3}


@pytest.mark.parametrize("path", FIELDS)
def test_no_body_makes_the_server_fail(served: Served, path: str) -> None:
    draw = random.Random(path)
    said: dict[str, Any] = {} if path == "/tokenize" else dict(GOOD)
    if path == "/v1/completions":
        said["prompt"] = "x"
    elif path == "/v1/responses":
        said = {"model": "toy", "max_output_tokens": 3, "input": "x"}
    elif path != "/tokenize":
        said["messages"] = [{"role": "user", "content": "x"}]
    if path == "/v1/messages/count_tokens":
        del said["max_tokens"]
    statuses = []
    with served.web() as web:
        for _ in range(250):
            body = said | {name: draw.choice(VALUES) for name in draw.sample(FIELDS[path], draw.choice((1, 1, 2, 3)))}
            answer = web.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
            missing = "the package llguidance is not installed" in answer.text
            assert answer.status_code < 500 or missing, (body, answer.text)
            if answer.status_code >= 400:
                assert answer.json()["error"]["message"], body
            assert "server_error" not in answer.text or missing, body
            statuses.append(answer.status_code)
        assert web.get("/health").status_code == 200
    assert {200, 400} <= set(statuses)
    assert served.shared.load.count == 0
