"""What comes between the parts of a piece that is read: decode steps of the others, once they have waited enough."""

from __future__ import annotations

import time
from collections.abc import Callable

from arriero.runtimes.pace import Pace


class Interlude:
    """Takes decode steps when it is called, before each part of a piece of `tokens`; raises nothing there."""

    def __init__(self, pace: Pace, tokens: int, decode: Callable[[], object]) -> None:
        """Keep to `pace`; `decode` takes one step of all that decode."""
        self._pace, self._tokens, self._decode = pace, tokens, decode
        self._error: BaseException | None = None
        self.seconds, self.parts = 0.0, 0  # that the decode steps took; of the piece, so far

    def __call__(self) -> None:
        """The next part of the piece is about to begin."""
        self.parts += 1
        if self._error is not None or not self._pace.is_due(self._tokens):
            return
        started = time.perf_counter()
        try:
            self._decode()
        except BaseException as error:  # through the library that calls there is no way for it
            self._error = error
        self.seconds += time.perf_counter() - started

    def check(self) -> None:
        """Raise what a decode step raised."""
        if self._error is not None:
            raise self._error
