"""An answer's text as it comes, held back for as long as it may be a call of a tool: that is known at its end only."""

from __future__ import annotations

from arriero.runtimes.processor.tool_calls import ToolCall
from arriero.runtimes.server.tools import Tools

CALL_STARTS = ("[", "{", "<")  # what an answer that calls tools begins with


class ToolText:
    """The text of one answer, which may be nothing but calls of `tools`."""

    def __init__(self, tools: Tools) -> None:
        """Hold text back where there are tools."""
        self._tools = tools
        self._held: str | None = "" if tools.records else None

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
        calls = self._tools.calls(held)
        return ("" if calls else held), calls
