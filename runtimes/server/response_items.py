"""The items that a request to /v1/responses is made of, as messages that the session takes."""

from __future__ import annotations

from typing import Any

from arriero.runtimes.server.entry_limit import EntryLimit
from arriero.runtimes.server.errors import RefusalError
from arriero.runtimes.server.fields import Fields
from arriero.runtimes.server.messages import ROLES
from arriero.runtimes.server.options import ServerOptions
from arriero.runtimes.server.pictures import PictureReader

TEXTS = ("input_text", "output_text", "text")
MESSAGE_ROLES = ("user", "assistant", "system", "developer")


class ItemReader:
    """Reads the items of one request."""

    def __init__(self, options: ServerOptions, entries: EntryLimit) -> None:
        """Keep to the limits of `options`, and to `entries`, over all items together."""
        self.pictures, self._entries = PictureReader(options), entries

    def read(self, instructions: str | None, said: Any) -> list[dict[str, Any]]:
        """Give `instructions` and what is `said`, a text or a list of items, as the session takes them."""
        messages: list[dict[str, Any]] = [] if instructions is None else [{"role": "system", "content": instructions}]
        if isinstance(said, str):
            return [*messages, {"role": "user", "content": said}]
        if not isinstance(said, list) or not said:
            raise RefusalError(400, "input is no text; expected a string or a list of items.", param="input")
        self._entries.take(said, "input")
        for number, item in enumerate(said):
            fields = Fields(item, f"input[{number}]")
            kind = fields.text("type", "message")
            fields.ignore(("id", "status", "phase"))
            if kind == "message":
                messages.append(self._message(fields))
            elif kind == "function_call":
                _add_call(messages, fields)
            elif kind == "function_call_output":
                messages.append(self._result(fields))
            else:
                expected = "expected message, function_call or function_call_output"
                raise fields.refusal("type", f"is {kind!r:.40}; {expected}, since this server keeps nothing")
            fields.refuse_others()
        return messages

    def _message(self, fields: Fields) -> dict[str, Any]:
        role = fields.text("role")
        if role not in MESSAGE_ROLES:
            raise fields.refusal("role", f"is {role!r:.40}; expected {', '.join(MESSAGE_ROLES)}")
        content = fields.take("content")
        if isinstance(content, list):
            where = fields.path("content")
            self._entries.take(content, where)
            content = [self._part(Fields(part, f"{where}[{n}]")) for n, part in enumerate(content)]
        elif not isinstance(content, str):
            raise fields.refusal("content", "is no text; expected a string or a list of parts")
        return {"role": ROLES.get(role, role), "content": content}

    def _part(self, fields: Fields) -> dict[str, Any]:
        kind = fields.text("type")
        if kind == "input_image":
            url = fields.text("image_url")
            if url is None:
                raise fields.refusal("image_url", "is missing; expected a URL, since this server keeps no files")
            fields.ignore(("detail",))
            fields.refuse_others()
            return self.pictures.entry(fields, "image_url", url)
        if kind not in TEXTS:
            raise fields.refusal("type", f"is {kind!r:.40}; expected input_text, input_image or output_text")
        return _text_entry(fields)

    def _result(self, fields: Fields) -> dict[str, Any]:
        output = fields.take("output")
        if isinstance(output, list):
            where = fields.path("output")
            self._entries.take(output, where)
            parts = [Fields(part, f"{where}[{n}]") for n, part in enumerate(output)]
            for part in parts:
                if (kind := part.text("type")) not in TEXTS:
                    raise part.refusal("type", f"is {kind!r:.40}; expected input_text")
            output = "\n".join(_text_entry(part)["text"] for part in parts)
        elif not isinstance(output, str):
            raise fields.refusal("output", "is no text; expected a string or a list of texts")
        return {"role": "tool", "content": output, "tool_call_id": fields.text("call_id", "")}


def _text_entry(fields: Fields) -> dict[str, Any]:
    text = fields.required_text("text")
    fields.ignore(("annotations", "logprobs"))
    fields.refuse_others()
    return {"type": "text", "text": text}


def _add_call(messages: list[dict[str, Any]], fields: Fields) -> None:
    """Add a call to what the assistant said last: all calls of one answer are one message."""
    function = {"name": fields.required_text("name"), "arguments": fields.required_text("arguments")}
    call = {"id": fields.text("call_id", ""), "type": "function", "function": function}
    if messages and messages[-1]["role"] == "assistant":
        messages[-1].setdefault("tool_calls", []).append(call)
    else:
        messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
