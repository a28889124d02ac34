"""An answer's text as it comes, held back for as long as it may be a call of a tool: that is known at its end only."""

from __future__ import annotations

from typing import Any

from arriero.runtimes.processor.tool_calls import ToolCall, parse_tool_calls

CALL_STARTS = ("[", "{", "<")  # what an answer that calls tools begins with


class ToolText:
    """The text of one answer, which calls tools where it `may` and is nothing but calls."""

    def __init__(self, may: bool) -> None:
        """Hold text back where `may`."""
        self._held: str | None = "" if may else None

    def push(self, text: str) -> str:
        """Give what of the text so far is certain to be words."""
        if self._held is None:
            return text
        self._held += text
        begun = self._held.lstrip()
        if not begun or begun.startswith(CALL_STARTS):
            return ""
        words, self._held = self._held, None
        return words

    def end(self) -> tuple[str, list[ToolCall]]:
        """The words that are left, or the calls that the answer is made of."""
        held, self._held = self._held or "", None
        calls = parse_tool_calls(held) if held else []
        return ("" if calls else held), calls


def call_schema(name: Any, parameters: Any) -> dict[str, Any]:
    """The schema of a call of the function `name`, in Llama 4's JSON."""
    return {
        "type": "object",
        "properties": {
            "type": {"const": "function"},
            "name": {"const": name},
            "parameters": parameters or {"type": "object", "properties": {}, "additionalProperties": False},
        },
        "required": ["type", "name", "parameters"],
        "additionalProperties": False,
    }
