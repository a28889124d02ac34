"""The tools of one request: what the chat template shows, whether an answer must call one, the calls in its text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from arriero.runtimes.forced_calls import ForcedCalls
from arriero.runtimes.processor.chat import ChatOptions
from arriero.runtimes.processor.tool_calls import ToolCall, parse_tool_calls

MOST_FORCED_CALLS = 16  # in one answer, so that its form ends


@dataclass(frozen=True)
class Tools:
    """The functions that an answer may call.

    `records` are what the template shows, as `{"type": "function", "function": ..}`. An answer is a call of one of
    `forced`, functions with name and parameters, where there are any. `parallel` lets it be several calls.
    """

    records: Sequence[dict[str, Any]] = ()
    forced: Sequence[dict[str, Any]] = ()
    parallel: bool = True

    @property
    def options(self) -> ChatOptions:
        """What the chat template is given."""
        return {"tools": self.records} if self.records else {}

    @property
    def form(self) -> dict[str, Any]:
        """The setting that forces a call."""
        if not self.forced:
            return {}
        return {"calls": ForcedCalls(self.forced, MOST_FORCED_CALLS if self.parallel else 1)}

    def calls(self, text: str) -> list[ToolCall]:
        """The calls that the answer `text` is made of; the first alone where it may not be several."""
        calls = parse_tool_calls(text) if self.records else []
        return calls if self.parallel else calls[:1]
