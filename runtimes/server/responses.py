"""/v1/responses: OpenAI's newer API over the same answers. Nothing is kept: a request brings all that came before."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from arriero.runtimes.generation import Generation
from arriero.runtimes.processor.processor import Prompt
from arriero.runtimes.server.answer_fields import (
    MOST_TOP_LOGPROBS,
    AnswerFields,
    read_most_tokens,
    read_sampling,
    read_stream_options,
)
from arriero.runtimes.server.answers import Answers
from arriero.runtimes.server.entry_limit import EntryLimit
from arriero.runtimes.server.fields import Fields
from arriero.runtimes.server.form_fields import read_text_form
from arriero.runtimes.server.models import Models
from arriero.runtimes.server.options import ServerOptions
from arriero.runtimes.server.response_body import (
    ResponseBody,
    call_item,
    message_id,
    message_item,
    status_of,
    text_part,
)
from arriero.runtimes.server.response_events import response_events
from arriero.runtimes.server.response_items import ItemReader
from arriero.runtimes.server.response_tools import read_response_tools
from arriero.runtimes.settings import Settings

IGNORED = (
    *("user", "reasoning", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_retention", "prompt_cache_options", "max_tool_calls"),
)
LOGPROBS = "message.output_text.logprobs"
INCLUDABLE = (LOGPROBS, "reasoning.encrypted_content")  # of the latter there is none
# What a server that keeps nothing answers with one value alone, and why another is refused.
STATELESS = {
    "store": (False, "this server keeps no responses"),
    "background": (False, "a response is computed while its client waits"),
    "previous_response_id": (None, "this server keeps no responses: send the earlier items in `input`"),
    "conversation": (None, "this server keeps no conversations: send the earlier items in `input`"),
    "prompt": (None, "this server keeps no prompts: write it in `input`"),
    "truncation": ("disabled", "nothing of a conversation is left out unasked"),
}


class ResponseRequest:
    """One request: read from its body, then answered."""

    operation = "chat"  # as OpenTelemetry's conventions have it
    count = 1

    def __init__(self, body: Any, models: Models, options: ServerOptions) -> None:
        """Read the body. Raises RefusalError for what cannot be answered."""
        fields = Fields(body)
        for name, (value, why) in STATELESS.items():
            if (said := fields.take(name, value)) != value:
                raise fields.refusal(name, f"is {said!r:.60}; {why}")
        model = models.get(fields.text("model"))
        settings = read_sampling(fields, model)
        settings["max_tokens"] = read_most_tokens(fields, ("max_output_tokens",), options)
        stream = fields.flag("stream")
        read_stream_options(fields, stream)
        self.asked = AnswerFields(model, settings, 1, stream, include_usage=True)
        text = fields.take("text")
        entries = EntryLimit(model.bundle.context)
        self.tools, tool_fields = read_response_tools(fields, entries)
        self.shown: Settings = {"logprobs": _read_logprobs(fields)}
        form = read_text_form(fields, text)
        self.shown |= self.tools.form or form  # type: ignore[typeddict-item]
        instructions = fields.text("instructions")
        items = ItemReader(options, entries)
        self.messages, self.pictures = items.read(instructions, fields.take("input")), items.pictures
        metadata = fields.take("metadata", {})
        if not isinstance(metadata, dict):
            raise fields.refusal("metadata", "is no object; expected texts by name")
        fields.ignore(IGNORED)
        fields.refuse_others()
        repeated: dict[str, Any] = {
            **{name: value for name, (value, _) in STATELESS.items() if name not in ("conversation", "prompt")},
            **tool_fields,
            "instructions": instructions,
            "max_output_tokens": settings["max_tokens"],
            "metadata": metadata,
            "reasoning": {"effort": None, "summary": None},
            "temperature": settings["temperature"],
            "text": text or {"format": {"type": "text"}},
            "top_p": 1.0 if settings["top_p"] is None else settings["top_p"],
        }
        self._body = ResponseBody(model, repeated)

    def encode(self) -> list[Prompt]:
        """The prompt's ids and tiles."""
        return [self.asked.model.session.encode(self.messages, **self.tools.options)]

    def whole(self, answers: Answers, results: list[Generation]) -> dict[str, Any]:
        """The answer in one piece."""
        (result,) = results
        output = [call_item(call) for call in self.tools.calls(result.text)]
        if not output:
            part = text_part(result.text, self._body.logprobs(result.logprobs or ()))
            output = [message_item(message_id(), status_of(answers), [part])]
        return self._body.finished(answers, output)

    def lines(self, answers: Answers) -> AsyncIterator[str]:
        """The answer as events."""
        return response_events(self._body, self.tools, answers)


def _read_logprobs(fields: Fields) -> int | None:
    included = fields.items("include") or []
    top = fields.integer("top_logprobs", least=0, most=MOST_TOP_LOGPROBS)
    for name in included:
        if name not in INCLUDABLE:
            raise fields.refusal("include", f"names {name!r:.60}; expected {' or '.join(INCLUDABLE)}")
    if LOGPROBS in included:
        return top or 0
    if top:
        raise fields.refusal("top_logprobs", f"goes with {LOGPROBS} in include only")
    return None
