"""The bodies that the server's paths take, as JSON schemas: their fields by name, and which of them must be there."""

from __future__ import annotations

from arriero.runtimes.server.answer_fields import IGNORED
from arriero.runtimes.server.completions import MOST_LOGPROBS
from arriero.runtimes.server.messages import ROLES
from arriero.runtimes.server.models import Models
from arriero.runtimes.server.openapi_messages import counted_body, messages_body
from arriero.runtimes.server.openapi_responses import responses_body
from arriero.runtimes.server.openapi_schemas import (
    ARGUMENTS,
    COUNT,
    FLAG,
    FORM,
    FULL,
    LOGPROBS,
    SAMPLING,
    SCHEMA,
    STREAM,
    TEXT,
    URL,
    Schema,
    listed,
    one_of,
    part,
    record,
    with_needs,
)
from arriero.runtimes.server.options import ServerOptions

FUNCTION = record(("name",), name=TEXT, description=TEXT, parameters=SCHEMA, strict=FLAG)
CALL = record(
    ("type", "function"),
    id=TEXT,
    type=one_of("function"),
    function=record(("name", "arguments"), name=TEXT, arguments=ARGUMENTS),
)
IMAGE_PART = part("image_url", image_url=record(("url",), url=URL, detail=TEXT))
CONTENT: Schema = {"anyOf": [TEXT, listed({"oneOf": [part("text", text=TEXT), IMAGE_PART]})]}
BESIDE: dict[str, Schema] = {"name": TEXT, "refusal": {}, "annotations": {}, "audio": {}, "function_call": {}}
MESSAGE = record(
    ("role", "content"),
    role=one_of("system", *ROLES, "user", "assistant", "tool"),
    content=CONTENT,
    tool_call_id=TEXT,
    **BESIDE,
)
CALLING = record(
    ("role", "tool_calls"),
    role=one_of("assistant"),
    content={"anyOf": [CONTENT, {"type": "null"}]},
    tool_calls=listed(CALL, 1),
    **BESIDE,
)
MESSAGES = listed({"anyOf": [MESSAGE, CALLING]}, 1)
NAMED: Schema = {"type": "object", "properties": {"function": record(("name",), name=TEXT)}, "required": ["function"]}


def answers(options: ServerOptions) -> dict[str, Schema]:
    """The fields that chat completions and completions share."""
    count = COUNT | {"maximum": options.most_answers}
    return {**SAMPLING, **STREAM, **FORM, "n": count, "max_tokens": COUNT, "max_completion_tokens": COUNT}


def bodies(models: Models, options: ServerOptions) -> dict[str, Schema]:
    """The schema of each path's body."""
    model = {"model": {"type": "string", "enum": models.names}}
    needed = () if models.has_default else ("model",)
    ignored: dict[str, Schema] = {name: {} for name in IGNORED}
    tokens = listed({"type": "integer", "minimum": 0}, 1)
    prompts: Schema = {"anyOf": [FULL, tokens, listed({"anyOf": [FULL, tokens]}, 1, options.most_answers)]}
    return {
        "/v1/chat/completions": with_needs(
            record(
                ("messages", *needed),
                **model,
                messages=MESSAGES,
                **answers(options),
                logprobs=FLAG,
                top_logprobs=LOGPROBS,
                tools=listed(record(("type", "function"), type=one_of("function"), function=FUNCTION)),
                tool_choice={"anyOf": [one_of("none", "auto", "required"), NAMED]},
                parallel_tool_calls=FLAG,
                modalities={},
                reasoning_effort={},
                **ignored,
            ),
            stream_options=("stream", True),
            top_logprobs=("logprobs", True),
        ),
        "/v1/completions": with_needs(
            record(
                ("prompt", *needed),
                **model,
                prompt=prompts,
                **answers(options),
                logprobs=LOGPROBS | {"maximum": MOST_LOGPROBS},
                echo=one_of(False),
                suffix=one_of(""),
                best_of=one_of(None),
                **ignored,
            ),
            stream_options=("stream", True),
        ),
        "/v1/messages": messages_body(model, needed),
        "/v1/messages/count_tokens": counted_body(model, needed),
        "/v1/responses": responses_body(model, needed),
        "/tokenize": {
            "oneOf": [
                record(("prompt", *needed), **model, prompt=TEXT),
                record(("messages", *needed), **model, messages=MESSAGES),
            ]
        },
    }
