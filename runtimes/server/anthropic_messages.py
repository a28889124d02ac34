"""/v1/messages and /v1/messages/count_tokens: Anthropic's API over the same answers."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import JSONResponse

from arriero.runtimes.generation import Generation
from arriero.runtimes.processor.processor import Prompt
from arriero.runtimes.processor.tool_calls import ToolCall
from arriero.runtimes.server.answer_fields import AnswerFields, read_stops
from arriero.runtimes.server.answers import Answers
from arriero.runtimes.server.anthropic_blocks import BlockReader
from arriero.runtimes.server.entry_limit import EntryLimit
from arriero.runtimes.server.errors import STREAM, RefusalError, told_refusal
from arriero.runtimes.server.fields import Fields
from arriero.runtimes.server.models import Models
from arriero.runtimes.server.options import ServerOptions
from arriero.runtimes.server.sse import typed_event
from arriero.runtimes.server.tool_text import ToolText
from arriero.runtimes.server.tools import Tools
from arriero.runtimes.settings import Settings

ERRORS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class AnthropicPrompt:
    """What a request shows the model: messages, pictures and tools."""

    def __init__(self, fields: Fields, models: Models, options: ServerOptions) -> None:
        """Read those of the body's `fields`. Raises RefusalError for what cannot be shown."""
        self.model = models.get(fields.text("model"))
        entries = EntryLimit(self.model.bundle.context)
        reader = BlockReader(options, entries)
        self.messages = reader.read(fields.take("system"), fields.items("messages"))
        self.pictures = reader.pictures
        self.tools = _read_tools(fields, entries)
        thinking = fields.fields("thinking")
        if thinking is not None and thinking.text("type") != "disabled":
            raise fields.refusal("thinking", "is not possible here")

    def encode(self) -> list[Prompt]:
        """The prompt's ids and tiles."""
        return [self.model.session.encode(self.messages, **self.tools.options)]


class AnthropicCount(AnthropicPrompt):
    """One request for the number of its prompt's tokens."""

    def __init__(self, body: Any, models: Models, options: ServerOptions) -> None:
        """Read the body. Raises RefusalError for what cannot be counted."""
        fields = Fields(body)
        super().__init__(fields, models, options)
        fields.refuse_others()


class AnthropicMessage(AnthropicPrompt):
    """One request: read from its body, then answered."""

    operation = "chat"  # as OpenTelemetry's conventions have it
    count = 1

    def __init__(self, body: Any, models: Models, options: ServerOptions) -> None:
        """Read the body. Raises RefusalError for what cannot be answered."""
        fields = Fields(body)
        super().__init__(fields, models, options)
        most = fields.integer("max_tokens", least=1)
        if most is None:
            raise fields.refusal("max_tokens", "is missing; expected a whole number of at least 1")
        temperature = fields.number("temperature", 1.0)
        settings: Settings = {
            "temperature": 0.0 if temperature is None else temperature,
            "top_p": fields.number("top_p"),
            "top_k": fields.integer("top_k", least=1),
            "max_tokens": most if options.most_tokens is None else min(most, options.most_tokens),
            "stop": read_stops(fields, "stop_sequences"),
            "adapter": self.model.adapter,
        }
        self.asked = AnswerFields(self.model, settings, 1, fields.flag("stream"), include_usage=True)
        self.shown: Settings = {**self.tools.form}  # type: ignore[typeddict-item]
        fields.ignore(("metadata", "service_tier"))
        fields.refuse_others()
        self.id = f"msg_{uuid.uuid4().hex}"

    def whole(self, answers: Answers, results: list[Generation]) -> dict[str, Any]:
        """The answer in one piece."""
        (result,) = results
        calls = self.tools.calls(result.text)
        content = [_tool_use(call) for call in calls] or [{"type": "text", "text": result.text}]
        return {**self._head(content), **self._reason(result, bool(calls)), "usage": _usage(answers, result)}

    async def lines(self, answers: Answers) -> AsyncIterator[str]:
        """The answer as events."""
        try:
            async for event in self._events(answers):
                yield typed_event(event)
        except Exception as error:
            yield typed_event(anthropic_error(told_refusal(error, STREAM)))

    async def _events(self, answers: Answers) -> AsyncIterator[dict[str, Any]]:
        text, begun, block = ToolText(self.tools), False, False
        async for _, delta in answers.deltas():
            if not begun:  # with the first token it is known what of the prompt had been read before
                begun = True
                usage = {"input_tokens": answers.streams[0].prompt_tokens, "output_tokens": 0}
                usage |= _cached(answers, usage["input_tokens"])
                yield {"type": "message_start", "message": {**self._head([]), "usage": usage, **_UNFINISHED}}
            words, calls = (text.push(delta.text), []) if delta is not None else text.end()
            if words:
                if not block:
                    block = True
                    yield {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
                yield {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": words}}
            for number, call in enumerate(calls):
                use = _tool_use(call)
                partial = {"type": "input_json_delta", "partial_json": json.dumps(use["input"], ensure_ascii=False)}
                yield {"type": "content_block_start", "index": number, "content_block": {**use, "input": {}}}
                yield {"type": "content_block_delta", "index": number, "delta": partial}
                yield {"type": "content_block_stop", "index": number}
            if delta is None:
                if block:
                    yield {"type": "content_block_stop", "index": 0}
                result = answers.streams[0].result
                reason, used = self._reason(result, bool(calls)), _usage(answers, result)
                yield {"type": "message_delta", "delta": reason, "usage": used}
        yield {"type": "message_stop"}

    def _head(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self.id, "type": "message", "role": "assistant", "model": self.asked.model.name}
        return {**head, "content": content}

    def _reason(self, result: Generation, calls: bool) -> dict[str, Any]:
        reason = "max_tokens" if result.finish_reason == "length" else "end_turn"
        if result.stop_text is not None:
            reason = "stop_sequence"
        return {"stop_reason": "tool_use" if calls else reason, "stop_sequence": result.stop_text}


def _read_tools(fields: Fields, entries: EntryLimit) -> Tools:
    tools, choice = fields.items("tools") or [], fields.fields("tool_choice")
    entries.take(tools, "tools")
    functions = []
    for number, one in enumerate(tools):
        tool = Fields(one, f"tools[{number}]")
        function = {
            "name": tool.required_text("name"),
            "description": tool.text("description", ""),
            "parameters": tool.take("input_schema") or {"type": "object", "properties": {}},
        }
        functions.append(function)
        tool.ignore(("type", "cache_control"))
        tool.refuse_others()
    kind, name, parallel = "auto", None, True
    if choice is not None:
        kind, name = choice.text("type") or "", choice.text("name")
        parallel = not choice.flag("disable_parallel_tool_use")
        choice.refuse_others()
    if kind not in ("auto", "none", "any", "tool"):
        raise fields.refusal("tool_choice", f"is {kind!r:.40}; expected auto, any, tool or none")
    forced = [each for each in functions if kind == "any" or (kind == "tool" and each["name"] == name)]
    if kind in ("any", "tool") and not forced:
        raise fields.refusal("tool_choice", "names none of the tools")
    records = [{"type": "function", "function": each} for each in functions] if kind != "none" else []
    return Tools(records, forced, parallel and kind != "tool")


_UNFINISHED = {"stop_reason": None, "stop_sequence": None}


def _tool_use(call: ToolCall) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex[:24]}", "name": call.name, "input": call.arguments}


def _usage(answers: Answers, result: Generation) -> dict[str, int]:
    return {"output_tokens": len(result.token_ids), **_cached(answers, result.prompt_tokens)}


def _cached(answers: Answers, prompt: int) -> dict[str, int]:
    """Tokens of the prompt as this API counts them: those read before are apart from the others."""
    reused = answers.streams[0].reused_tokens
    return {"input_tokens": prompt - reused, "cache_read_input_tokens": reused, "cache_creation_input_tokens": 0}


def anthropic_error(refusal: RefusalError) -> dict[str, Any]:
    """A refusal as this API has it."""
    kind = ERRORS.get(refusal.status, "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": refusal.message}}


def anthropic_response(refusal: RefusalError) -> JSONResponse:
    """The whole answer."""
    return JSONResponse(anthropic_error(refusal), refusal.status, refusal.headers)
