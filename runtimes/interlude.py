"""What comes between the parts of what is read: decode steps of the others, once they have waited enough.

And a look at whether anybody still wants what is read.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from arriero.runtimes.backend import GIVE_UP
from arriero.runtimes.pace import Pace

LOOK_S = 0.05  # seconds in which nobody looks, at most


def no_step() -> None:
    """What comes between where nobody waits."""


class Interlude:
    """Takes decode steps when it is called, before each part of a piece or a tile; raises nothing there."""

    def __init__(self, pace: Pace, decode: Callable[[], bool], unwanted: Callable[[], bool]) -> None:
        """Keep to `pace`; `decode` takes one step of all that decode, and gives whether anybody waits for the next.

        What is read is given up once it is `unwanted`.
        """
        self._pace, self._decode, self._unwanted = pace, decode, unwanted
        self._waited_for = True
        self._error: BaseException | None = None
        self._left = time.perf_counter()  # when the last part began

    def __call__(self) -> float:
        """The next part is about to begin, and is expected to take as long as the last one: most are alike in turn.

        Whichever of before and after it is nearer to when the others' step is due is when it is taken. Gives the
        seconds to when it is to be called again, or that the step is to be given up.
        """
        part_s = time.perf_counter() - self._left
        if self._error is None and self._waited_for and self._pace.is_due(part_s / 2):
            try:
                self._waited_for = self._decode()
            except BaseException as error:  # through the library that calls there is no way for it
                self._error = error
        self._left = time.perf_counter()
        if self._unwanted():
            return GIVE_UP
        waits = self._waited_for and self._error is None
        return min(self._pace.rest(), LOOK_S) if waits else LOOK_S

    def check(self) -> None:
        """Raise what a decode step raised."""
        if self._error is not None:
            raise self._error
