"""How many tokens of an answer are worth drafting, by how the drafts before did."""

from __future__ import annotations

LONGEST_PAUSE = 32  # tokens without a draft, after drafts that were all wrong


class DraftLength:
    """The tokens to draft next of one answer: more after hits, fewer or later after misses."""

    def __init__(self, most: int) -> None:
        """Begin with drafts of `most` tokens, and never draft more."""
        self._most = self._length = most
        self._pause, self._paused = 1, 0  # tokens without a draft after a miss, and those still to come

    def next(self) -> int:
        """The tokens to draft behind the next token; 0 in a pause, of which that token is one."""
        if self._paused:
            self._paused -= 1
            return 0
        return self._length

    def learn(self, drafted: int, accepted: int) -> None:
        """Of `drafted` tokens the first `accepted` were right: more are drafted after that, or fewer, or later."""
        if accepted == drafted:
            self._length = min(2 * self._length, self._most)
        else:
            self._length = max(accepted, 1)
        if accepted:
            self._pause = 1
        else:
            self._paused = self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
