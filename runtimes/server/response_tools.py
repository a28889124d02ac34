"""The tools of a request to /v1/responses, whose functions stand flat, and what the response repeats of them."""

from __future__ import annotations

from typing import Any

from arriero.runtimes.server.entry_limit import EntryLimit
from arriero.runtimes.server.fields import Fields
from arriero.runtimes.server.tools import Tools


def read_response_tools(fields: Fields, entries: EntryLimit) -> tuple[Tools, dict[str, Any]]:
    """Give the tools, and the fields of the response that say them again."""
    said, choice = fields.items("tools") or [], fields.take("tool_choice", "auto")
    parallel = fields.flag("parallel_tool_calls", True)
    repeated = {"tools": said, "tool_choice": choice, "parallel_tool_calls": parallel}
    entries.take(said, "tools")
    functions = [_read_function(Fields(tool, f"tools[{number}]")) for number, tool in enumerate(said)]
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = choice.get("tools")
        allowed = allowed if isinstance(allowed, list) else []
        entries.take(allowed, "tool_choice")
        by_name = {function["name"]: [function] for function in functions}
        names = [one.get("name") for one in allowed if isinstance(one, dict)]
        functions = [_named(fields, by_name.get(str(name), []), name) for name in names]
        choice = choice.get("mode")
    records = [{"type": "function", "function": function} for function in functions]
    if isinstance(choice, dict):
        return Tools(records, [_named(fields, functions, choice.get("name"))], parallel=False), repeated
    if choice == "required" and functions:
        return Tools(records, functions, parallel), repeated
    if choice not in ("auto", "none"):
        raise fields.refusal("tool_choice", f"is {choice!r:.60}; expected none, auto, required or a tool")
    return Tools(records if choice == "auto" else (), (), parallel), repeated


def _read_function(tool: Fields) -> dict[str, Any]:
    kind = tool.text("type")
    if kind != "function":
        raise tool.refusal("type", f"is {kind!r:.40}; expected function: this server has no tools of its own")
    function = {
        "name": tool.required_text("name"),
        "description": tool.text("description", ""),
        "parameters": tool.take("parameters") or {"type": "object", "properties": {}},
    }
    tool.ignore(("strict",))
    tool.refuse_others()
    return function


def _named(fields: Fields, functions: list[dict[str, Any]], name: Any) -> dict[str, Any]:
    for function in functions:
        if function["name"] == name:
            return function
    raise fields.refusal("tool_choice", f"names {name!r:.60}; expected one of the tools")
