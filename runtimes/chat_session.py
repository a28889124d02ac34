"""A conversation that keeps its place: every turn reads its own tokens, not the whole of what was said.

Shapes: S tokens, n tiles.
What the model said stays the tokens that it chose, whatever ids its text would be encoded to; a turn adds what the chat
template puts behind an answer.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack, cast

import numpy as np

from arriero.errors import ArrieroError
from arriero.runtimes.generation import Generation
from arriero.runtimes.place import Place, no_conversation
from arriero.runtimes.processor.chat import Message, as_messages
from arriero.runtimes.processor.pictures import Images, as_list
from arriero.runtimes.processor.processor import Prompt
from arriero.runtimes.request import Request
from arriero.runtimes.settings import Settings, chat_options, read_settings
from arriero.runtimes.stream import Stream

if TYPE_CHECKING:
    from arriero.runtimes.session import Session


class Chat:
    """One conversation with a session's model; `messages` is what was said, without the pictures."""

    def __init__(
        self,
        session: Session,
        messages: Sequence[Message],
        settings: Settings,
        place: Place | None = None,
    ) -> None:
        """Go on from `messages`, of which `place` has read all; every turn has `settings`, and its own over them."""
        self._session, self._settings, self._place = session, settings, place
        self.messages: list[dict[str, Any]] = [dict(message) for message in messages]
        self._answering: Request | None = None

    def send(self, message: str | Message, images: Images = None, **settings: Unpack[Settings]) -> Generation:
        """Say `message`, a user's text or any message, and give the answer; `images` are those of its image entries."""
        return self.stream(message, images, **settings).wait()

    def stream(self, message: str | Message, images: Images = None, **settings: Unpack[Settings]) -> Stream:
        """`send` in pieces, as `Session.stream` gives them; the turn counts once it was read to its end."""
        if self._answering is not None and self._answering.answer.finished is None and not self._answering.cancelled:
            what, remedy = "the turn before is still being answered", "Read its stream to the end, or close it"
            raise ArrieroError(what, remedy=remedy)
        wrapped = message if isinstance(message, Mapping) else as_messages(message, len(as_list(images)), None)[0]
        turn = dict(wrapped)
        merged = cast(Settings, {**self._settings, **settings})
        read, adapter = read_settings(merged), merged.get("adapter", self._session.adapter)
        messages = [*self.messages, turn]
        prompt = self._prompt(messages, images, merged)
        request = self._answering = self._session.request(prompt, read, adapter)
        request.place, request.keeps_place = self._place, True

        def answered(answer: Generation) -> None:
            if request.kept is None:  # cancelled before anything was said
                return
            reply = {"role": "assistant", "content": answer.text}
            self.messages = [*messages[:-1], _without_pictures(turn), reply]
            ids = np.concatenate([request.ids, np.array(answer.token_ids, np.int64)])
            if answer.token_ids and answer.token_ids[-1] in self._session.spec.eos_token_ids:
                ids = ids[:-1]  # the template closes an answer itself
            self._place = Place(ids, prompt.pixel_values, request.kept)

        return self._session.submit(request, answered)

    def _prompt(self, messages: Sequence[Message], images: Images, settings: Settings) -> Prompt:
        """The conversation's tokens with those of the last of `messages` behind what was said."""
        options = chat_options(settings)
        if self._place is None:
            return self._session.encode(messages, images, **options)
        added = self._session.encode_turn(messages, images, **options)
        tiles = [part for part in (self._place.tiles, added.pixel_values) if part is not None]
        ids = np.concatenate([self._place.ids, added.input_ids])
        return self._session.encode(Prompt(ids, np.concatenate(tiles) if tiles else None))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the conversation to a file, keys and values included, for `Session.load_chat`."""
        if self._place is None:
            raise ArrieroError("nothing has been said yet", expected="at least one answered message")
        said = {"messages": self.messages, "settings": _kept_settings(self._settings), "model": self._session.identity}
        self._place.save(path, said)


def load_chat(session: Session, path: str | os.PathLike[str], settings: Settings) -> Chat:
    """Go on with a conversation that `Chat.save` wrote. Raises ArrieroError for one with another bundle."""
    place, said = Place.load(path, session.spec)
    try:
        model, messages, kept = (said[name] for name in ("model", "messages", "settings"))
    except KeyError as error:
        raise no_conversation(path, error) from None
    if model != session.identity:
        raise ArrieroError(
            "the conversation was held with another bundle",
            where=str(path),
            remedy="Load the bundle that it was held with: another computes other keys and values",
        )
    if not (isinstance(messages, list) and all(isinstance(one, dict) and "role" in one for one in messages)):
        raise no_conversation(path, ValueError("what was said is no list of messages"))
    if not isinstance(kept, dict):
        raise no_conversation(path, ValueError("its settings are no mapping"))
    return Chat(session, messages, cast(Settings, {**kept, **settings}), place)


def _kept_settings(settings: Settings) -> dict[str, Any]:
    """Those of `settings` that a file can hold."""
    live = ("sampling", "cancel", "logits_processor", "logit_bias")
    return {name: value for name, value in settings.items() if name not in live}


def _without_pictures(message: Mapping[str, Any]) -> dict[str, Any]:
    """`message` with image entries that bring no picture of their own."""
    content = message.get("content")
    if not isinstance(content, list | tuple):
        return dict(message)
    kept = [{"type": "image"} if entry.get("type") == "image" else entry for entry in content]
    return {**message, "content": kept}
