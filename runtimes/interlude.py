"""What comes between the parts of what is read: decode steps of the others, once they have waited enough."""

from __future__ import annotations

import time
from collections.abc import Callable

from arriero.runtimes.pace import Pace

NEVER = 1e9  # seconds


def no_step() -> None:
    """What comes between where nobody waits."""


class Interlude:
    """Takes decode steps when it is called, before each part of a piece or a tile; raises nothing there."""

    def __init__(self, pace: Pace, decode: Callable[[], object]) -> None:
        """Keep to `pace`; `decode` takes one step of all that decode."""
        self._pace, self._decode = pace, decode
        self._error: BaseException | None = None
        self._left = time.perf_counter()  # when the last part began

    def __call__(self) -> float:
        """The next part is about to begin, and is expected to take as long as the last one: most are alike in turn.

        Whichever of before and after it is nearer to when the others' step is due is when it is taken. Gives the
        seconds to when the next one is.
        """
        part_s = time.perf_counter() - self._left
        if self._error is None and self._pace.is_due(part_s / 2):
            try:
                self._decode()
            except BaseException as error:  # through the library that calls there is no way for it
                self._error = error
        self._left = time.perf_counter()
        return self._pace.rest() if self._error is None else NEVER

    def check(self) -> None:
        """Raise what a decode step raised."""
        if self._error is not None:
            raise self._error
