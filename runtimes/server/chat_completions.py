"""/v1/chat/completions: messages in, answers out, whole or as they come."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from arriero.runtimes.generation import Generation, TokenLogprobs
from arriero.runtimes.processor.processor import Prompt
from arriero.runtimes.processor.tool_calls import ToolCall
from arriero.runtimes.server.answer_fields import MOST_TOP_LOGPROBS, AnswerFields, read_answer_fields
from arriero.runtimes.server.answers import Answers
from arriero.runtimes.server.entry_limit import EntryLimit
from arriero.runtimes.server.fields import Fields
from arriero.runtimes.server.form_fields import read_form
from arriero.runtimes.server.logprob_entries import logprob_entries
from arriero.runtimes.server.messages import MessageReader
from arriero.runtimes.server.models import Model, Models
from arriero.runtimes.server.options import ServerOptions
from arriero.runtimes.server.sse import events
from arriero.runtimes.server.tool_text import ToolText
from arriero.runtimes.server.tools import Tools
from arriero.runtimes.settings import Settings


class ChatCompletion:
    """One request: read from its body, then answered."""

    operation = "chat"  # as OpenTelemetry's conventions have it

    def __init__(self, body: Any, models: Models, options: ServerOptions) -> None:
        """Read the body. Raises RefusalError for what cannot be answered."""
        fields = Fields(body)
        self.asked: AnswerFields = read_answer_fields(fields, models, options, None)
        entries = EntryLimit(self.model.bundle.context)
        reader = MessageReader(options, entries)
        self.messages, self.pictures = reader.read(fields.items("messages")), reader.pictures
        top = fields.integer("top_logprobs", least=0, most=MOST_TOP_LOGPROBS)
        shows_logprobs = fields.flag("logprobs")
        if top is not None and not shows_logprobs:
            raise fields.refusal("top_logprobs", "goes with logprobs only")
        self.shown: Settings = {"logprobs": (top or 0) if shows_logprobs else None}
        form = read_form(fields)
        self.tools = _read_tools(fields, entries)
        self.shown |= self.tools.form or form  # type: ignore[typeddict-item]
        fields.ignore(("modalities", "reasoning_effort"))
        fields.refuse_others()
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    @property
    def model(self) -> Model:
        """What answers."""
        return self.asked.model

    @property
    def count(self) -> int:
        """How many answers are asked for."""
        return self.asked.count

    def encode(self) -> list[Prompt]:
        """The prompt's ids and tiles."""
        return [self.model.session.encode(self.messages, **self.tools.options)]

    def whole(self, answers: Answers, results: list[Generation]) -> dict[str, Any]:
        """The answer in one piece."""
        choices = []
        for number, result in enumerate(results):
            message: dict[str, Any] = {"role": "assistant", "content": result.text, "refusal": None}
            reason = result.finish_reason
            if calls := self.tools.calls(result.text):
                message |= {"content": None, "tool_calls": [self._call(call) for call in calls]}
                reason = "tool_calls"  # type: ignore[assignment]
            logprobs = None if result.logprobs is None else self._logprobs(result.logprobs)
            choices.append({"index": number, "message": message, "finish_reason": reason, "logprobs": logprobs})
        return {**self._head("chat.completion"), "choices": choices, "usage": answers.usage()}

    def lines(self, answers: Answers) -> AsyncIterator[str]:
        """The answer as events."""
        return events(self._chunks(answers))

    async def _chunks(self, answers: Answers) -> AsyncIterator[dict[str, Any]]:
        """The answer as it comes."""
        for number in range(len(answers.streams)):
            yield self._chunk(number, {"role": "assistant", "content": ""})
        texts = [ToolText(self.tools) for _ in answers.streams]
        async for number, delta in answers.deltas():
            if delta is not None:
                text = texts[number].push(delta.text)
                logprobs = self._logprobs(delta.logprobs)
                if text or logprobs["content"]:
                    told = logprobs if logprobs["content"] else None
                    yield self._chunk(number, {"content": text}, logprobs=told)
                continue
            words, calls = texts[number].end()
            if calls:
                indexed = [{"index": n, **self._call(call)} for n, call in enumerate(calls)]
                yield self._chunk(number, {"tool_calls": indexed})
            elif words:
                yield self._chunk(number, {"content": words})
            reason = answers.streams[number].result.finish_reason
            yield self._chunk(number, {}, "tool_calls" if calls else reason)
        if self.asked.include_usage:
            yield {**self._head("chat.completion.chunk"), "choices": [], "usage": answers.usage()}

    def _head(self, kind: str) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model.name}
        return {**head, "system_fingerprint": self.model.fingerprint}

    def _chunk(
        self, number: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None
    ) -> dict[str, Any]:
        choice = {"index": number, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
        usage: dict[str, Any] = {"usage": None} if self.asked.include_usage else {}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **usage}

    def _call(self, call: ToolCall) -> dict[str, Any]:
        return {"id": f"call_{uuid.uuid4().hex[:24]}", **call.to_message()}

    def _logprobs(self, entries: tuple[TokenLogprobs, ...]) -> dict[str, Any]:
        return {"content": logprob_entries(self.model.session.processor, entries), "refusal": None}


def _read_tools(fields: Fields, entries: EntryLimit) -> Tools:
    tools, choice = fields.items("tools") or [], fields.take("tool_choice", "auto")
    parallel = fields.flag("parallel_tool_calls", True)
    entries.take(tools, "tools")
    for number, tool in enumerate(tools):
        if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict):
            raise fields.refusal(f"tools[{number}]", 'is no function; expected {"type": "function", "function": ..}')
    functions = [tool["function"] for tool in tools]
    if isinstance(choice, dict):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        forced = [one for one in functions if one.get("name") == name]
        if not forced:
            raise fields.refusal("tool_choice", f"names {name!r:.60}; expected one of the tools")
        return Tools(tools, forced, parallel=False)
    if choice == "required" and tools:
        return Tools(tools, functions, parallel)
    if choice not in ("auto", "none"):
        raise fields.refusal("tool_choice", f"is {choice!r:.60}; expected none, auto, required or a tool")
    return Tools(tools if choice == "auto" else (), (), parallel)
