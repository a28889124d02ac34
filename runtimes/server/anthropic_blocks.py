"""Anthropic's messages, made of blocks, as the session takes them."""

from __future__ import annotations

from typing import Any

from arriero.runtimes.server.entry_limit import EntryLimit
from arriero.runtimes.server.errors import RefusalError
from arriero.runtimes.server.fields import Fields
from arriero.runtimes.server.options import ServerOptions
from arriero.runtimes.server.pictures import PictureReader


class BlockReader:
    """Reads the messages of one request."""

    def __init__(self, options: ServerOptions, entries: EntryLimit) -> None:
        """Keep to the limits of `options`, and to `entries`, over all messages together."""
        self.pictures, self._entries = PictureReader(options), entries

    def read(self, system: Any, messages: list[Any] | None) -> list[dict[str, Any]]:
        """Give `system` and `messages` as the session takes them."""
        if not messages:
            raise RefusalError(400, "messages is empty; expected at least one message.", param="messages")
        self._entries.take(messages, "messages")
        plain: list[dict[str, Any]] = []
        if system is not None:
            plain.append({"role": "system", "content": self._texts(system, "system")})
        for number, message in enumerate(messages):
            fields = Fields(message, f"messages[{number}]")
            role = fields.text("role")
            if role not in ("user", "assistant"):
                raise fields.refusal("role", f"is {role!r:.40}; expected user or assistant")
            plain += self._message(role, fields.take("content"), fields.path("content"))
            fields.refuse_others()
        return plain

    def _message(self, role: str, content: Any, where: str) -> list[dict[str, Any]]:
        """One message, or the results of tools and what the user says beside them."""
        if isinstance(content, str):
            return [{"role": role, "content": content}]
        if not isinstance(content, list) or not content:
            raise RefusalError(400, f"{where} is no text; expected a string or a list of blocks.", param=where)
        self._entries.take(content, where)
        entries: list[dict[str, Any]] = []
        calls: list[dict[str, Any]] = []
        results: list[dict[str, Any]] = []
        for number, block in enumerate(content):
            fields = Fields(block, f"{where}[{number}]")
            kind = fields.text("type")
            fields.ignore(("cache_control", "citations"))
            if kind == "text":
                entries.append({"type": "text", "text": fields.required_text("text")})
            elif kind == "image" and role == "user":
                entries.append(self._image(fields))
            elif kind == "tool_use" and role == "assistant":
                function = {"name": fields.required_text("name"), "arguments": fields.take("input", {})}
                calls.append({"id": fields.text("id"), "type": "function", "function": function})
            elif kind == "tool_result" and role == "user":
                result = self._texts(fields.take("content", ""), fields.path("content"))
                results.append({"role": "tool", "content": result, "tool_call_id": fields.text("tool_use_id", "")})
                fields.ignore(("is_error",))
            else:
                raise fields.refusal("type", f"is {kind!r:.40}; expected text, image, tool_use or tool_result")
            fields.refuse_others()
        if calls:
            said = "".join(entry["text"] for entry in entries)
            return [{"role": role, "content": said or None, "tool_calls": calls}]
        return [*results, *([{"role": role, "content": entries}] if entries else [])]

    def _image(self, fields: Fields) -> dict[str, Any]:
        source = fields.fields("source")
        kind = None if source is None else source.text("type")
        if source is None or kind not in ("base64", "url"):
            raise fields.refusal("source", "is missing; expected an object of type base64 or url")
        if kind == "url":
            entry = self.pictures.entry(source, "url", source.required_text("url"))
        else:
            source.ignore(("media_type",))
            entry = self.pictures.decoded(source, "data", source.required_text("data"))
        source.refuse_others()
        return entry

    def _texts(self, content: Any, where: str) -> str:
        """A text, or the texts of blocks, one behind the other."""
        if isinstance(content, str):
            return content
        if not isinstance(content, list):
            raise RefusalError(400, f"{where} is no text; expected a string or a list of texts.", param=where)
        self._entries.take(content, where)
        texts = []
        for number, block in enumerate(content):
            fields = Fields(block, f"{where}[{number}]")
            if fields.text("type") != "text":
                raise fields.refusal("type", "is not text")
            texts.append(fields.required_text("text"))
            fields.ignore(("cache_control", "citations"))
            fields.refuse_others()
        return "\n".join(texts)
