"""Token ids to text as they come, never half a UTF-8 character."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_HALF = "\ufffd"


class Detokenizer:
    """Turns a growing list of ids into text pieces; the pieces joined are the decoded whole."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        """Use `decode`, which turns a list of ids into text."""
        self._decode = decode
        self._ids: list[int] = []
        # [_context, _done) is the last piece, decoded again with the new ids, since a tokenizer may treat the
        # first id of a list differently (a leading space, say)
        self._context, self._done = 0, 0

    def push(self, token: int) -> str:
        """Take one more id and give the text it completes, often but not always non-empty."""
        self._ids.append(token)
        before, after = self._decoded()
        if after.endswith(_HALF) or len(after) <= len(before):
            return ""
        self._context, self._done = self._done, len(self._ids)
        return after[len(before) :]

    def flush(self) -> str:
        """Give what is left at the end, where an unfinished character shows as U+FFFD."""
        before, after = self._decoded()
        self._context, self._done = self._done, len(self._ids)
        return after[len(before) :]

    def _decoded(self) -> tuple[str, str]:
        return self._decode(self._ids[self._context : self._done]), self._decode(self._ids[self._context :])
