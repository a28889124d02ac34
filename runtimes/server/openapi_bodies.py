"""The bodies that the server's paths take, as JSON schemas: their fields by name, and which of them must be there."""

from __future__ import annotations

from typing import Any

from arriero.runtimes.server.answer_fields import IGNORED, MOST_STOPS, MOST_TOP_LOGPROBS
from arriero.runtimes.server.completions import MOST_LOGPROBS
from arriero.runtimes.server.messages import ROLES
from arriero.runtimes.server.models import Models
from arriero.runtimes.server.options import ServerOptions
from arriero.runtimes.server.responses import IGNORED as RESPONSES_IGNORED
from arriero.runtimes.server.responses import INCLUDABLE, LOGPROBS, STATELESS

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
NUMBER: Schema = {"type": "number"}
OBJECT: Schema = {"type": "object"}
COUNT: Schema = {"type": "integer", "minimum": 1}


def one_of(*values: Any) -> Schema:
    """One of some values."""
    return {"enum": list(values)}


def record(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    """An object of these fields and no others."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def with_needs(schema: Schema, **needs: tuple[str, Any]) -> Schema:
    """`schema`, some of whose fields need another to have a value."""
    dependent = {
        field: {"properties": {other: {"const": value}}, "required": [other]} for field, (other, value) in needs.items()
    }
    return {**schema, "dependentSchemas": dependent}


def listed(items: Schema, least: int = 0, most: int | None = None) -> Schema:
    """A list of `items`."""
    schema: Schema = {"type": "array", "items": items, "minItems": least}
    return schema if most is None else schema | {"maxItems": most}


def part(kind: str, **properties: Schema) -> Schema:
    """A part of a message's content, by its type."""
    return record(("type", *properties), type=one_of(kind), **properties)


URL: Schema = {"type": "string", "description": "data:image/...;base64,..., or https from a domain that is allowed"}
ARGUMENTS: Schema = {"type": "string", "contentMediaType": "application/json", "examples": ["{}"]}
SCHEMA: Schema = {"type": "object", "description": "a JSON schema"}
FORM_FIELDS = {"name": TEXT, "schema": SCHEMA, "strict": FLAG, "description": TEXT}
FULL: Schema = {"type": "string", "minLength": 1}
STOPS = listed(FULL, 0, MOST_STOPS)
SAMPLING: dict[str, Schema] = {
    "temperature": {"type": "number", "minimum": 0, "default": 1},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "top_k": COUNT,
    "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    "repetition_penalty": {"type": "number", "exclusiveMinimum": 0, "default": 1},
    "presence_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "frequency_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "seed": {"type": "integer"},
    "logit_bias": {"type": "object", "patternProperties": {"^[0-9]{1,9}$": NUMBER}, "additionalProperties": False},
    "stop": {"anyOf": [FULL, STOPS]},
}
STREAM: dict[str, Schema] = {"stream": FLAG, "stream_options": record(include_usage=FLAG, include_obfuscation=FLAG)}
FORM: dict[str, Schema] = {
    "response_format": {
        "oneOf": [
            part("text"),
            part("json_object"),
            part("json_schema", json_schema=record(("schema",), **FORM_FIELDS)),
        ]
    },
    "structured_outputs": {
        "oneOf": [
            record((name,), **{name: schema})
            for name, schema in {"json": SCHEMA, "regex": TEXT, "choice": listed(FULL, 1), "grammar": TEXT}.items()
        ]
    },
}
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
    most = options.most_answers
    return {
        **SAMPLING,
        **STREAM,
        **FORM,
        "n": COUNT | {"maximum": most},
        "max_tokens": COUNT,
        "max_completion_tokens": COUNT,
    }


def bodies(models: Models, options: ServerOptions) -> dict[str, Schema]:
    """The schema of each path's body."""
    model = {"model": {"type": "string", "enum": models.names}}
    needed = () if models.has_default else ("model",)
    ignored: dict[str, Schema] = {name: {} for name in IGNORED}
    logprobs = {"type": "integer", "minimum": 0, "maximum": MOST_TOP_LOGPROBS}
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
                top_logprobs=logprobs,
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
                logprobs=logprobs | {"maximum": MOST_LOGPROBS},
                echo=one_of(False),
                suffix=one_of(""),
                best_of=one_of(None),
                **ignored,
            ),
            stream_options=("stream", True),
        ),
        "/v1/messages": _anthropic(model, needed),
        "/v1/responses": _responses(model, needed, logprobs),
        "/tokenize": {
            "oneOf": [
                record(("prompt", *needed), **model, prompt=TEXT),
                record(("messages", *needed), **model, messages=MESSAGES),
            ]
        },
    }


def _anthropic(model: dict[str, Schema], needed: tuple[str, ...]) -> Schema:
    cached: dict[str, Schema] = {"cache_control": {}, "citations": {}}
    text = record(("type", "text"), type=one_of("text"), text=TEXT, **cached)
    source = [
        record(("type", "data"), type=one_of("base64"), media_type=TEXT, data=TEXT),
        record(("type", "url"), type=one_of("url"), url=URL),
    ]
    blocks = [
        text,
        record(("type", "source"), type=one_of("image"), source={"oneOf": source}, **cached),
        record(("type", "name"), type=one_of("tool_use"), id=TEXT, name=TEXT, input=OBJECT, **cached),
        record(
            ("type", "tool_use_id"),
            type=one_of("tool_result"),
            tool_use_id=TEXT,
            content={"anyOf": [TEXT, listed(text)]},
            is_error=FLAG,
            **cached,
        ),
    ]
    content: Schema = {"anyOf": [TEXT, listed({"oneOf": blocks}, 1)]}
    choice = record(("type",), type=one_of("auto", "none", "any", "tool"), name=TEXT, disable_parallel_tool_use=FLAG)
    tool = record(("name",), name=TEXT, description=TEXT, input_schema=SCHEMA, type={}, cache_control={})
    return record(
        ("max_tokens", "messages", *needed),
        **model,
        max_tokens=COUNT,
        messages=listed(record(("role", "content"), role=one_of("user", "assistant"), content=content), 1),
        system={"anyOf": [TEXT, listed(text)]},
        **{name: SAMPLING[name] for name in ("temperature", "top_p", "top_k")},
        stop_sequences=STOPS,
        stream=FLAG,
        tools=listed(tool),
        tool_choice=choice,
        thinking=part("disabled"),
        metadata={},
        service_tier={},
    )


def _responses(model: dict[str, Schema], needed: tuple[str, ...], logprobs: Schema) -> Schema:
    marks: dict[str, Schema] = {"id": TEXT, "status": {}, "phase": {}}
    texts = [
        record(("type", "text"), type=one_of(kind), text=TEXT, annotations={}, logprobs={})
        for kind in ("input_text", "output_text", "text")
    ]
    image = record(("type", "image_url"), type=one_of("input_image"), image_url=URL, detail=TEXT)
    items = [
        record(
            ("role", "content"),
            type=one_of("message"),
            role=one_of("user", "assistant", "system", "developer"),
            content={"anyOf": [TEXT, listed({"oneOf": [*texts, image]})]},
            **marks,
        ),
        record(
            ("type", "name", "arguments"),
            type=one_of("function_call"),
            call_id=TEXT,
            name=TEXT,
            arguments=TEXT,
            **marks,
        ),
        record(
            ("type", "output"),
            type=one_of("function_call_output"),
            call_id=TEXT,
            output={"anyOf": [TEXT, listed({"oneOf": texts})]},
            **marks,
        ),
    ]
    form: Schema = {
        "oneOf": [
            part("text"),
            part("json_object"),
            record(("type", "schema"), type=one_of("json_schema"), **FORM_FIELDS),
        ]
    }
    function = record(
        ("type", "name"), type=one_of("function"), name=TEXT, description=TEXT, parameters=SCHEMA, strict=FLAG
    )
    named = record(("type", "name"), type=one_of("function"), name=TEXT)
    allowed = record(
        ("type", "mode", "tools"), type=one_of("allowed_tools"), mode=one_of("auto", "required"), tools=listed(named)
    )
    body = record(
        ("input", *needed),
        **model,
        input={"anyOf": [TEXT, listed({"oneOf": items}, 1)]},
        instructions=TEXT,
        **SAMPLING,
        **STREAM,
        max_output_tokens=COUNT,
        include=listed(one_of(*INCLUDABLE)),
        top_logprobs=logprobs,
        text=record(format=form, verbosity={}),
        tools=listed(function),
        tool_choice={"anyOf": [one_of("none", "auto", "required"), named, allowed]},
        parallel_tool_calls=FLAG,
        metadata=OBJECT,
        **{name: one_of(value) for name, (value, _) in STATELESS.items()},
        **{name: {} for name in RESPONSES_IGNORED},
    )
    return with_needs(body, stream_options=("stream", True), top_logprobs=("include", [LOGPROBS]))
