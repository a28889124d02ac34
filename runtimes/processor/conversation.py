"""A conversation as a chat template takes it, and its text, where control tokens of the template are told from letters
that users typed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from arriero.errors import ArrieroError
from arriero.runtimes.processor.chat_template import ChatTemplate
from arriero.runtimes.processor.vocabulary import Vocabulary

PlainMessage = dict[str, Any]
# Characters that may stand for others: first those that JSON leaves alone, then those that mean nothing.
_LETTERS, _PRIVATE = "~^`@$", range(0xE000, 0xF8FF)


@dataclass(frozen=True)
class Rendered:
    """A prompt's text, and the same text with control tokens only where they stand for themselves.

    `boundary`, where it is not empty, is no text: what stands on either side of it is encoded by itself.
    """

    text: str
    control: str
    boundary: str = ""


@dataclass(frozen=True)
class Conversation:
    """Messages, and what else a template may show, as plain data; `continued`: the answer goes on with the last one."""

    messages: list[PlainMessage]
    tools: list[PlainMessage] | None = None
    documents: list[PlainMessage] | None = None
    continued: bool = False

    def render(self, template: ChatTemplate, special_tokens: bool, vocabulary: Vocabulary) -> Rendered:
        """Give the text of `template`. With `special_tokens`, control tokens that users typed count like its own.

        Otherwise the template renders the messages once more with a mask over every character that a control token
        may begin or end with. What still spells a control token is the template's.
        """
        for name in ("tools", "documents"):
            if getattr(self, name) is not None and name not in template.source.text:
                what, remedy = f"the chat template takes no {name}", f"Leave {name} out, or write them into a message"
                raise ArrieroError(what, where=template.source.where, remedy=remedy)
        parts = [self.messages, self.tools, self.documents]
        written = set().union(*_texts(parts))
        used = written | set(template.source.text) | vocabulary.control_letters
        mask, end = _unused(_LETTERS, used, 2)
        boundary = next(_unused("", used | {mask, end}, 1))
        text = self._text(template, boundary, end)
        if special_tokens or not written & vocabulary.ends:
            return Rendered(text, text, boundary)
        messages, tools, documents = (_masked(part, vocabulary.ends, mask) for part in parts)
        masked = replace(self, messages=messages, tools=tools, documents=documents)
        control = masked._text(template, boundary, end)
        if len(text) == len(control) and all(c in (t, mask) for t, c in zip(text, control, strict=True)):
            return Rendered(text, control, boundary)
        spelled, own = ([m.group() for m in vocabulary.control_tokens(each)] for each in (text, control))
        if spelled == own:  # the template rewrites what users write, and no token of theirs came through
            return Rendered(text, text, boundary)
        raise ArrieroError(
            "a message spells a control token, and the chat template rewrites messages so that it cannot be told from "
            "the template's own",
            where=template.source.where,
            remedy="Take it out of the message, or encode the prompt with special_tokens=True if it is meant",
        )

    def _text(self, template: ChatTemplate, boundary: str, end: str) -> str:
        messages = _with_end(self.messages, f"{end} ") if self.continued else self.messages
        text = template.render(messages, self.tools, self.documents, not self.continued, boundary)
        return _up_to_end(text, end, self.messages, template.source.where) if self.continued else text


def _unused(letters: str, used: set[str], count: int) -> Iterator[str]:
    """The first `count` of `letters`, or of those that mean nothing, that are not `used`."""
    return islice((letter for letter in chain(letters, map(chr, _PRIVATE)) if letter not in used), count)


def _masked(value: Any, characters: frozenset[str], mask: str) -> Any:
    """A copy of plain data with `mask`, one character, in the place of each of `characters` in what users wrote.

    Roles and types are not masked where they are plain words, since templates compare them.
    """
    if isinstance(value, str):
        return value.translate({ord(character): mask for character in characters})
    if isinstance(value, list):
        return [_masked(item, characters, mask) for item in value]
    if isinstance(value, dict):
        return {
            _masked(key, characters, mask): item if _is_kind(key, item) else _masked(item, characters, mask)
            for key, item in value.items()
        }
    return value


def _is_kind(key: str, value: Any) -> bool:
    return key in ("role", "type") and isinstance(value, str) and value.isidentifier()


def _texts(value: Any) -> Iterator[str]:
    """Every text in plain data, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item)


# --- an answer that goes on with the last message: its text ends where that message's words do


def _last_words(message: Mapping[str, Any]) -> str | None:
    """The last text of a message's content."""
    content = message["content"]
    if isinstance(content, list):
        return next((entry["text"] for entry in reversed(content) if entry["type"] == "text"), None)
    return content if isinstance(content, str) else None


def _with_end(messages: Sequence[PlainMessage], end: str) -> list[PlainMessage]:
    """The messages with `end` behind the last one's last text."""
    last = messages[-1]
    words = _last_words(last)
    if words is None:
        raise ArrieroError(
            "the last message has no text to go on with",
            where=f"messages[{len(messages) - 1}].content",
            expected="a text, since continue_final_message is set",
        )
    content: Any = words + end
    if not isinstance(last["content"], str):
        content = list(last["content"])
        at = max(index for index, entry in enumerate(content) if entry["type"] == "text")
        content[at] = {**content[at], "text": words + end}
    return [*messages[:-1], {**last, "content": content}]


def _up_to_end(text: str, end: str, messages: Sequence[PlainMessage], where: str) -> str:
    """The text before `end`, which a space follows; where the template took that space, spaces before it go too."""
    words = _last_words(messages[-1])
    assert words is not None  # `_with_end` has seen to it
    at = text.rfind(end)
    if at < 0 or words.strip() not in text:
        raise ArrieroError(
            "the chat template does not show the last message as it is written, so no answer can go on with it",
            where=where,
            remedy="Leave continue_final_message out",
        )
    return text[:at] if text[at + 1 : at + 2] == " " else text[:at].rstrip()
