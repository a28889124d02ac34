"""Messages as OpenAI's API has them, made those that the session takes.

Nothing of a message reaches a file, and the network as `PictureReader` has it alone: entries are built anew.
"""

from __future__ import annotations

from typing import Any

from arriero.runtimes.server.entry_limit import EntryLimit
from arriero.runtimes.server.errors import RefusalError
from arriero.runtimes.server.fields import Fields
from arriero.runtimes.server.options import ServerOptions
from arriero.runtimes.server.pictures import PictureReader

ROLES = {"developer": "system"}  # roles that are other names of ours


class MessageReader:
    """Reads the messages of one request."""

    def __init__(self, options: ServerOptions, entries: EntryLimit) -> None:
        """Keep to the limits of `options`, and to `entries`, over all messages together."""
        self.pictures, self._entries = PictureReader(options), entries

    def read(self, messages: list[Any] | None) -> list[dict[str, Any]]:
        """Give the messages as the session takes them."""
        if not messages:
            raise RefusalError(400, "messages is empty; expected at least one message.", param="messages")
        self._entries.take(messages, "messages")
        return [self._message(Fields(message, f"messages[{n}]")) for n, message in enumerate(messages)]

    def _message(self, fields: Fields) -> dict[str, Any]:
        role = fields.text("role")
        if role is None:
            raise fields.refusal("role", "is missing; expected system, user, assistant or tool")
        message: dict[str, Any] = {"role": ROLES.get(role, role)}
        content = fields.take("content")
        calls = fields.items("tool_calls")
        if calls:
            self._entries.take(calls, fields.path("tool_calls"))
            message["tool_calls"] = calls
        if isinstance(content, list):
            where = fields.path("content")
            self._entries.take(content, where)
            message["content"] = [self._entry(Fields(entry, f"{where}[{n}]")) for n, entry in enumerate(content)]
        elif isinstance(content, str) or (content is None and calls):
            message["content"] = content
        else:
            raise fields.refusal("content", "is no text; expected a string or a list of parts")
        for name in ("tool_call_id", "name"):
            if (value := fields.text(name)) is not None:
                message[name] = value
        fields.ignore(("refusal", "annotations", "audio", "function_call"))
        fields.refuse_others()
        return message

    def _entry(self, fields: Fields) -> dict[str, Any]:
        kind = fields.text("type")
        if kind == "text":
            text = fields.required_text("text")
            fields.refuse_others()
            return {"type": "text", "text": text}
        if kind == "image_url":
            image = fields.fields("image_url")
            url = None if image is None else image.text("url")
            if image is None or url is None:
                raise fields.refusal("image_url", "is missing; expected an object with a url")
            image.ignore(("detail",))
            image.refuse_others()
            fields.refuse_others()
            return self.pictures.entry(image, "url", url)
        raise fields.refusal("type", f"is {kind!r:.40}; expected text or image_url")
