"""A gate before a backend's steps, for tests that look at what happens between two of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any


class Gate:
    """Lets a backend take so many steps, of pieces or of decoding, then waits until more are let through."""

    def __init__(self, backend: Any) -> None:
        self._forward, self._steps = backend.forward, threading.Semaphore(0)
        backend.forward = self.forward

    def forward(self, *arguments: Any, **named: Any) -> Any:
        assert self._steps.acquire(timeout=60)
        return self._forward(*arguments, **named)

    def left(self) -> int:
        """Steps that are let through and not taken yet."""
        return self._steps._value

    def open_while(self, going: Callable[[], Any]) -> None:
        """Let a step through every tenth of a second for as long as something is `going`."""
        while going():
            self.open(1)
            time.sleep(0.1)

    def open(self, steps: int) -> None:
        self._steps.release(steps)
