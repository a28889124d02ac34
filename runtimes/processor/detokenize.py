"""Token ids to text as they come, never half a UTF-8 character; control tokens apart from what is said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

_HALF = "\ufffd"


class Decode(Protocol):
    """Turns a list of ids into text, with its special tokens or without."""

    def __call__(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Give the text of `ids`."""
        ...


@dataclass(frozen=True)
class Piece:
    """A piece of text; `special` where it is what a control token is called."""

    text: str
    special: bool = False


class Detokenizer:
    """Turns a growing list of ids into pieces; joined, with the special ones or without, they are the decoded whole."""

    def __init__(self, decode: Decode, skip_special_tokens: bool = True) -> None:
        """Use `decode`; `skip_special_tokens` says which of its two wholes the pieces make, special ones left out."""
        self._decode, self._skip = decode, skip_special_tokens
        self._ids: list[int] = []
        self._special: dict[int, bool] = {}
        # [_context, _done) is the last piece, decoded again with the new ids, since a tokenizer may treat the
        # first id of a list differently (a leading space, say)
        self._context, self._done = 0, 0

    def is_special(self, token: int) -> bool:
        """Whether `token` is a control token: text comes of it with special tokens, and none without them."""
        if token not in self._special:
            self._special[token] = not self._decode([token]) and bool(self._decode([token], skip_special_tokens=False))
        return self._special[token]

    def push(self, token: int) -> list[Piece]:
        """Take one more id and give the text that it completes: often one piece, none within a character."""
        if self.is_special(token):
            name = Piece(self._decode([token], skip_special_tokens=False), special=True)
            if self._skip:  # it parts nothing: a character may be begun before it and ended after it
                return [name]
            rest = self.flush()
            self._ids.append(token)
            self._context, self._done = self._done, len(self._ids)
            return [*rest, name]
        self._ids.append(token)
        before, after = self._decoded()
        if after.endswith(_HALF) or len(after) <= len(before):
            return []
        self._context, self._done = self._done, len(self._ids)
        return [Piece(after[len(before) :])]

    def flush(self) -> list[Piece]:
        """Give what is left at the end, where an unfinished character shows as U+FFFD."""
        before, after = self._decoded()
        self._context, self._done = self._done, len(self._ids)
        return [Piece(after[len(before) :])] if len(after) > len(before) else []

    def _decoded(self) -> tuple[str, str]:
        before, after = self._ids[self._context : self._done], self._ids[self._context :]
        return self._decode(before, skip_special_tokens=self._skip), self._decode(after, skip_special_tokens=self._skip)
