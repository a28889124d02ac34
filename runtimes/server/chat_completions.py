"""/v1/chat/completions: messages in, answers out, whole or as they come."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from arriero.runtimes.generation import Generation, TokenLogprobs
from arriero.runtimes.processor.chat import ChatOptions
from arriero.runtimes.processor.processor import Prompt
from arriero.runtimes.processor.tool_calls import ToolCall, parse_tool_calls
from arriero.runtimes.server.answer_fields import MOST_TOP_LOGPROBS, AnswerFields, read_answer_fields
from arriero.runtimes.server.answers import Answers
from arriero.runtimes.server.fields import Fields
from arriero.runtimes.server.form_fields import read_form
from arriero.runtimes.server.messages import MessageReader
from arriero.runtimes.server.models import Model, Models
from arriero.runtimes.server.options import ServerOptions
from arriero.runtimes.server.sse import events
from arriero.runtimes.server.tool_text import ToolText, call_schema
from arriero.runtimes.settings import Settings


class ChatCompletion:
    """One request: read from its body, then answered."""

    def __init__(self, body: Any, models: Models, options: ServerOptions) -> None:
        """Read the body. Raises RefusalError for what cannot be answered."""
        fields = Fields(body)
        self.asked: AnswerFields = read_answer_fields(fields, models, options, None)
        self.messages = MessageReader(options).read(fields.items("messages"))
        top = fields.integer("top_logprobs", least=0, most=MOST_TOP_LOGPROBS)
        shows_logprobs = fields.flag("logprobs")
        if top is not None and not shows_logprobs:
            raise fields.refusal("top_logprobs", "goes with logprobs only")
        self.shown: Settings = {"logprobs": (top or 0) if shows_logprobs else None}
        self.shown |= read_form(fields)  # type: ignore[typeddict-item]
        self.tools = self._tools(fields)
        fields.ignore(("parallel_tool_calls", "modalities", "reasoning_effort"))
        fields.refuse_others()
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    def _tools(self, fields: Fields) -> list[dict[str, Any]] | None:
        tools, choice = fields.items("tools"), fields.take("tool_choice", "auto")
        for number, tool in enumerate(tools or ()):
            if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict):
                raise fields.refusal(
                    f"tools[{number}]", 'is no function; expected {"type": "function", "function": ..}'
                )
        names = [tool["function"].get("name") for tool in tools or ()]
        if isinstance(choice, dict):
            function = choice.get("function")
            named = function.get("name") if isinstance(function, dict) else None
            if named not in names:
                raise fields.refusal("tool_choice", f"names {named!r:.60}; expected one of the tools")
            self._force([tool for tool in tools or () if tool["function"].get("name") == named])
        elif choice == "required" and tools:
            self._force(tools)
        elif choice not in ("auto", "none"):
            raise fields.refusal("tool_choice", f"is {choice!r:.60}; expected none, auto, required or a tool")
        return tools if tools and choice != "none" else None

    def _force(self, tools: list[dict[str, Any]]) -> None:
        """Let the answer be a call of one of `tools`, in Llama 4's JSON."""
        self.shown["json_schema"] = {
            "anyOf": [call_schema(tool["function"].get("name"), tool["function"].get("parameters")) for tool in tools]
        }

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
        options: ChatOptions = {} if self.tools is None else {"tools": self.tools}
        return [self.model.session.encode(self.messages, **options)]

    def whole(self, answers: Answers, results: list[Generation]) -> dict[str, Any]:
        """The answer in one piece."""
        choices = []
        for number, result in enumerate(results):
            message: dict[str, Any] = {"role": "assistant", "content": result.text, "refusal": None}
            reason = result.finish_reason
            if self.tools is not None and (calls := parse_tool_calls(result.text)):
                message |= {"content": None, "tool_calls": [self._call(call) for call in calls]}
                reason = "tool_calls"  # type: ignore[assignment]
            logprobs = self._logprobs(result.logprobs or ())
            choices.append({"index": number, "message": message, "finish_reason": reason, "logprobs": logprobs})
        return {**self._head("chat.completion"), "choices": choices, "usage": answers.usage()}

    def lines(self, answers: Answers) -> AsyncIterator[str]:
        """The answer as events."""
        return events(self._chunks(answers))

    async def _chunks(self, answers: Answers) -> AsyncIterator[dict[str, Any]]:
        """The answer as it comes."""
        for number in range(len(answers.streams)):
            yield self._chunk(number, {"role": "assistant", "content": ""})
        texts = [ToolText(self.tools is not None) for _ in answers.streams]
        async for number, delta in answers.deltas():
            if delta is not None:
                text = texts[number].push(delta.text)
                if text or delta.logprobs:
                    yield self._chunk(number, {"content": text}, logprobs=self._logprobs(delta.logprobs))
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

    def _logprobs(self, entries: tuple[TokenLogprobs, ...]) -> dict[str, Any] | None:
        if self.shown["logprobs"] is None or not entries:
            return None
        return {"content": [self._logprob(entry) for entry in entries], "refusal": None}

    def _logprob(self, entry: TokenLogprobs) -> dict[str, Any]:
        top = [self._token(token, logprob) for token, logprob in entry.top]
        return {**self._token(entry.token_id, entry.logprob), "top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.model.session.processor.decode([token], skip_special_tokens=False)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
