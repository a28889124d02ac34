"""The text of an answer up to its first stop text: what is certain is given, what may begin one is held back."""

from __future__ import annotations

from collections.abc import Sequence

from arriero.runtimes.processor.detokenize import Piece


class StopText:
    """Text as it comes, special tokens included, since a stop text may be one; they are given where they are shown."""

    def __init__(self, stops: Sequence[str], skip_special_tokens: bool) -> None:
        """End before the earliest of `stops`; leave special tokens out of what is given where `skip_special_tokens`."""
        self._stops, self._skip = stops, skip_special_tokens
        self._held = ""
        self._hidden: list[tuple[int, int]] = []  # where special tokens lie in it, if they are not shown
        self.stopped_by: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop text is complete."""
        return self.stopped_by is not None

    def push(self, piece: Piece) -> None:
        """Add a piece; sets `stopped_by` where a stop text is complete, after which nothing more is added."""
        if self.stopped:
            return
        if piece.special and self._skip:
            self._hidden.append((len(self._held), len(self._held) + len(piece.text)))
        self._held += piece.text
        places = [(place, text) for text in self._stops if (place := self._held.find(text)) >= 0]
        if places:
            place, self.stopped_by = min(places)
            self._held = self._held[:place]

    def take(self) -> str:
        """Give what cannot be part of a stop text any more."""
        keep = max((_overlap(self._held, text) for text in self._stops), default=0)
        return self._give(len(self._held) - keep)

    def rest(self) -> str:
        """Give all that is held."""
        return self._give(len(self._held))

    def _give(self, count: int) -> str:
        given, start = "", 0
        for first, end in self._hidden:
            given += self._held[start : min(first, count)]
            start = min(end, count)
        given += self._held[start:count]
        self._held = self._held[count:]
        self._hidden = [(max(first - count, 0), end - count) for first, end in self._hidden if end > count]
        return given


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
