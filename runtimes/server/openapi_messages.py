"""The bodies of /v1/messages and of what counts their tokens, as JSON schemas."""

from __future__ import annotations

from arriero.runtimes.server.openapi_schemas import (
    COUNT,
    FLAG,
    OBJECT,
    SAMPLING,
    SCHEMA,
    STOPS,
    TEXT,
    URL,
    Schema,
    listed,
    one_of,
    part,
    record,
)


def messages_body(model: dict[str, Schema], needed: tuple[str, ...]) -> Schema:
    """Its schema, over the field `model`, which is `needed` or not."""
    return record(
        ("max_tokens", "messages", *needed),
        **model,
        **_prompt(),
        max_tokens=COUNT,
        **{name: SAMPLING[name] for name in ("temperature", "top_p", "top_k")},
        stop_sequences=STOPS,
        stream=FLAG,
        metadata={},
        service_tier={},
    )


def counted_body(model: dict[str, Schema], needed: tuple[str, ...]) -> Schema:
    """That of /v1/messages/count_tokens."""
    return record(("messages", *needed), **model, **_prompt())


def _prompt() -> dict[str, Schema]:
    """The fields of what the model is shown."""
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
    return {
        "messages": listed(record(("role", "content"), role=one_of("user", "assistant"), content=content), 1),
        "system": {"anyOf": [TEXT, listed(text)]},
        "tools": listed(tool),
        "tool_choice": choice,
        "thinking": part("disabled"),
    }
