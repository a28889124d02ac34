"""What a request says of an answer's form: OpenAI's `response_format`, and `structured_outputs` as vLLM has it."""

from __future__ import annotations

from typing import Any

from arriero.runtimes.server.fields import Fields

NAMES = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar"}  # theirs and ours


def read_form(fields: Fields) -> dict[str, Any]:
    """The settings that the fields come to; none where the answer may be any text."""
    said, structured = fields.fields("response_format"), fields.fields("structured_outputs")
    form: dict[str, Any] = {}
    if structured is not None:
        form = {ours: value for theirs, ours in NAMES.items() if (value := structured.take(theirs)) is not None}
        structured.refuse_others()
    if said is None:
        return form
    kind = said.text("type")
    if kind == "json_object":
        form["json_schema"] = {"type": "object"}
    elif kind == "json_schema":
        described = said.fields("json_schema")
        schema = None if described is None else described.take("schema")
        if described is None or not isinstance(schema, dict):
            raise said.refusal("json_schema", "has no schema; expected an object with name and schema")
        described.ignore(("name", "strict", "description"))
        described.refuse_others()
        form["json_schema"] = schema
    elif kind != "text":
        raise said.refusal("type", f"is {kind!r:.40}; expected text, json_object or json_schema")
    said.refuse_others()
    return form
