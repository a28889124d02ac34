"""Threads for what would hold up the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

Result = TypeVar("Result")


class Workers:
    """So many threads, and no more work at once than that: a client that leaves does not free its thread sooner."""

    def __init__(self, most: int, name: str) -> None:
        """Start at most `most` threads, once they are needed."""
        self._pool = ThreadPoolExecutor(most, name)

    async def run(self, work: Callable[[], Result]) -> Result:
        """What `work` gives on one of the threads, with the caller's context variables; dropped where it still waits
        for a thread when the caller is cancelled.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, copy_context().run, work)
