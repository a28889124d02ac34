"""A conversation as a chat template takes it, and its text, where control tokens of the template are told from letters
that users typed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import chain
from typing import Any

from arriero.errors import ArrieroError
from arriero.runtimes.processor.chat_template import ChatTemplate
from arriero.runtimes.processor.own_letters import HALVES, MARKINGS
from arriero.runtimes.processor.vocabulary import Vocabulary, no_character

PlainMessage = dict[str, Any]
# Characters that may stand for others: first those that JSON leaves alone, then those that mean nothing.
_LETTERS, _PRIVATE = "~^`@$", range(0xE000, 0xF8FF)
_HALF = re.compile(f"[{chr(HALVES[0])}-{chr(HALVES[-1])}]")


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

    def render(
        self,
        template: ChatTemplate,
        special_tokens: bool,
        vocabulary: Vocabulary,
        most: int | None = None,
        read: int = 0,
    ) -> Rendered:
        """Give the text of `template`. With `special_tokens`, control tokens that users typed count like its own.

        Otherwise control tokens are those that the template wrote, every letter of them. Raises ArrieroError where
        that cannot be told of one, and where the text behind its first `read` characters is surely more than `most`
        tokens: only a template says what of the messages it shows, so it is asked once, and nothing else is done.
        """
        for name in ("tools", "documents"):
            if getattr(self, name) is not None and name not in template.source.text:
                what, remedy = f"the chat template takes no {name}", f"Leave {name} out, or write them into a message"
                raise ArrieroError(what, where=template.source.where, remedy=remedy)
        texts = {*_texts([self.messages, self.tools, self.documents])}
        if any(not text.isascii() and _HALF.search(text) for text in texts):
            raise no_character()
        used = [*texts, template.source.text, *vocabulary.control_letters]
        end = next(_unused(_LETTERS, used))
        boundary = next(_unused("", [*used, end]))
        now = datetime.now()
        whole = self._text(template, boundary, end, now)
        text = _up_to_end(whole, end, self.messages, template.source.where) if self.continued else whole
        vocabulary.refuse_long(text[read:] if read else text, most, boundary)
        if special_tokens:
            return Rendered(text, text, boundary)
        written = set().union(*texts)
        letters, control, thorough = vocabulary.own_letters, boundary * len(text), False
        for marking in MARKINGS:
            asked = self if not marking.roles else replace(self, messages=_with_roles(self.messages, letters.mark))
            try:
                marked = asked._text(template.marked(letters, marking), boundary, end, now)
            except ArrieroError:  # of a template that cannot work with stand-ins in these places
                continue
            if letters.plain(marked) != whole:
                continue
            # What one marking shows to be the template's remains so, whatever another shows.
            control = _merged(control, letters.only_own(marked[: len(text)], boundary), boundary)
            thorough = thorough or marking.is_thorough
            if not _doubtful(vocabulary, text, control, boundary, written if thorough else set()):
                return Rendered(text, control, boundary)
        raise ArrieroError(
            "it cannot be told which control tokens of the prompt the chat template wrote, and which a message spells",
            where=template.source.where,
            remedy="Take what looks like a control token out of the messages, or encode the prompt with "
            "special_tokens=True if it is meant",
        )

    def _text(self, template: ChatTemplate, boundary: str, end: str, now: datetime) -> str:
        messages = _with_end(self.messages, f"{end} ") if self.continued else self.messages
        return template.render(messages, self.tools, self.documents, not self.continued, boundary, now)


def _merged(first: str, second: str, filler: str) -> str:
    """Two texts of one length, each with `filler` in the places of which it says nothing."""
    if first.strip(filler):
        return "".join(b if a == filler else a for a, b in zip(first, second, strict=True))
    return second


def _doubtful(vocabulary: Vocabulary, text: str, control: str, filler: str, by_users: set[str]) -> bool:
    """Whether `text` spells a control token that the template may have had a part in, and that is not in `control`.

    One that is made of letters `by_users` alone, none of them the template's, is what a user wrote.
    """
    own = {found.span() for found in vocabulary.control_tokens(control)}
    others = (found for found in vocabulary.control_tokens(text) if found.span() not in own)
    return any(
        control[found.start() : found.end()].strip(filler) or not by_users.issuperset(found.group()) for found in others
    )


def _with_roles(messages: Sequence[PlainMessage], change: Callable[[str], str]) -> list[PlainMessage]:
    return [{**message, "role": change(message["role"])} for message in messages]


def _unused(letters: str, used: Collection[str]) -> Iterator[str]:
    """Those of `letters`, and of those that mean nothing, that none of the texts `used` holds."""
    return (letter for letter in chain(letters, map(chr, _PRIVATE)) if not any(letter in text for text in used))


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
