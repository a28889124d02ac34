"""What a request says of an answer's form: OpenAI's `response_format` or `text.format`, vLLM's `structured_outputs`."""

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
    described = said.fields("json_schema") if (kind := said.text("type")) == "json_schema" else None
    if kind == "json_schema" and described is None:
        raise said.refusal("json_schema", "has no schema; expected an object with name and schema")
    form |= _read_kind(said, kind, described)
    if described is not None:
        described.refuse_others()
    return form


def read_text_form(fields: Fields, said: Any) -> dict[str, Any]:
    """The settings that `said`, the field `text` of OpenAI's newer API, comes to."""
    if said is None:
        return {}
    text = Fields(said, fields.path("text"))
    text.ignore(("verbosity",))
    form = text.fields("format")
    text.refuse_others()
    return {} if form is None else _read_kind(form, form.text("type"), form)


def _read_kind(said: Fields, kind: str | None, described: Fields | None) -> dict[str, Any]:
    """The settings of a form of that kind, whose schema stands in `described`."""
    form: dict[str, Any] = {}
    if kind == "json_object":
        form["json_schema"] = {"type": "object"}
    elif kind == "json_schema" and described is not None:
        form["json_schema"] = described.take("schema")
        if not isinstance(form["json_schema"], dict):
            raise described.refusal("schema", "is no schema; expected a JSON object")
        described.ignore(("name", "strict", "description"))
    elif kind != "text":
        raise said.refusal("type", f"is {kind!r:.40}; expected text, json_object or json_schema")
    said.refuse_others()
    return form
