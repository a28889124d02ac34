"""A response as it comes: the typed events of OpenAI's newer API, numbered in their order."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

from arriero.runtimes.generation import TokenLogprobs
from arriero.runtimes.server.answers import Answers
from arriero.runtimes.server.errors import STREAM, told_refusal
from arriero.runtimes.server.response_body import (
    ResponseBody,
    call_item,
    message_id,
    message_item,
    status_of,
    text_part,
)
from arriero.runtimes.server.sse import typed_event
from arriero.runtimes.server.tool_text import ToolText
from arriero.runtimes.server.tools import Tools

Event = dict[str, Any]


async def response_events(body: ResponseBody, tools: Tools, answers: Answers) -> AsyncIterator[str]:
    """The events of one response; an error on the way ends it as failed."""
    number = 0
    try:
        async for event in _events(body, tools, answers):
            yield typed_event({**event, "sequence_number": number})
            number += 1
    except Exception as error:
        failure = {"code": "server_error", "message": told_refusal(error, STREAM).message}
        failed = {"type": "response.failed", "response": body.now("failed", [], error=failure)}
        yield typed_event({**failed, "sequence_number": number})


async def _events(body: ResponseBody, tools: Tools, answers: Answers) -> AsyncIterator[Event]:
    for kind in ("created", "in_progress"):
        yield {"type": f"response.{kind}", "response": body.now("in_progress", [])}
    text, message = ToolText(tools), _Message(body)
    output: list[Event] = []
    held: tuple[TokenLogprobs, ...] = ()  # of text that is held back
    async for _, delta in answers.deltas():
        if delta is not None:
            held += delta.logprobs
            if words := text.push(delta.text):
                for event in message.add(words, held):
                    yield event
                held = ()
            continue
        words, calls = text.end()
        for call in calls:
            item = call_item(call)
            for event in _call_events(item, len(output)):
                yield event
            output.append(item)
        if not calls:
            for event in (*message.add(words, held), *message.end(status_of(answers))):
                yield event
            output.append(message.item)
    final = body.finished(answers, output)
    yield {"type": f"response.{final['status']}", "response": final}


class _Message:
    """The message that an answer's words are, which is the response's only item."""

    def __init__(self, body: ResponseBody) -> None:
        self._body, self._id = body, message_id()
        self._text, self._logprobs, self._begun = "", list[Event](), False
        self.item: Event = {}

    def add(self, words: str, entries: tuple[TokenLogprobs, ...]) -> Iterator[Event]:
        """The events of more words."""
        if not self._begun:
            self._begun = True
            item = message_item(self._id, "in_progress", [])
            yield {"type": "response.output_item.added", "output_index": 0, "item": item}
            yield self._event("content_part.added", part=text_part("", []))
        logprobs = self._body.logprobs(entries)
        if words or logprobs:
            self._text += words
            self._logprobs += logprobs
            yield self._event("output_text.delta", delta=words, logprobs=logprobs)

    def end(self, status: str) -> Iterator[Event]:
        """The events of its end."""
        part = text_part(self._text, self._logprobs)
        yield self._event("output_text.done", text=self._text, logprobs=self._logprobs)
        yield self._event("content_part.done", part=part)
        self.item = message_item(self._id, status, [part])
        yield {"type": "response.output_item.done", "output_index": 0, "item": self.item}

    def _event(self, kind: str, **more: Any) -> Event:
        return {"type": f"response.{kind}", "item_id": self._id, "output_index": 0, "content_index": 0, **more}


def _call_events(item: Event, index: int) -> Iterator[Event]:
    """A call's events; its arguments come in one piece, since it is known at the answer's end that it is one."""
    begun = {**item, "arguments": "", "status": "in_progress"}
    where, arguments = {"item_id": item["id"], "output_index": index}, item["arguments"]
    yield {"type": "response.output_item.added", "output_index": index, "item": begun}
    yield {"type": "response.function_call_arguments.delta", **where, "delta": arguments}
    yield {"type": "response.function_call_arguments.done", **where, "name": item["name"], "arguments": arguments}
    yield {"type": "response.output_item.done", "output_index": index, "item": item}
