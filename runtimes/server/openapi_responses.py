"""The body of /v1/responses as a JSON schema."""

from __future__ import annotations

from arriero.runtimes.server.openapi_schemas import (
    COUNT,
    FLAG,
    FORM_FIELDS,
    LOGPROBS,
    OBJECT,
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
from arriero.runtimes.server.responses import IGNORED, INCLUDABLE, STATELESS
from arriero.runtimes.server.responses import LOGPROBS as INCLUDED


def responses_body(model: dict[str, Schema], needed: tuple[str, ...]) -> Schema:
    """Its schema, over the field `model`, which is `needed` or not."""
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
        top_logprobs=LOGPROBS,
        text=record(format=form, verbosity={}),
        tools=listed(function),
        tool_choice={"anyOf": [one_of("none", "auto", "required"), named, allowed]},
        parallel_tool_calls=FLAG,
        metadata=OBJECT,
        **{name: one_of(value) for name, (value, _) in STATELESS.items()},
        **{name: {} for name in IGNORED},
    )
    return with_needs(body, stream_options=("stream", True), top_logprobs=("include", [INCLUDED]))
