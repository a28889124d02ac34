"""The pieces of an answer as they come, for threads and for `asyncio`; `result` is the whole of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from queue import Empty
from typing import Self

from arriero.errors import ArrieroError
from arriero.runtimes.engine import Engine
from arriero.runtimes.generation import Generation
from arriero.runtimes.request import Delta, Request


class Stream(Iterator[str], AsyncIterator[str]):
    """Give an answer's text with `for` or `async for`; a stream that is dropped or closed ends its answer.

    The engine does not wait for its reader: pieces that come meanwhile are kept.
    """

    def __init__(self, engine: Engine, request: Request, answered: Callable[[Generation], None] | None = None) -> None:
        """Follow `request`, which `engine` was handed; `answered` is called with the whole answer once it is read."""
        self._engine, self._request, self._answered, self._ended = engine, request, answered, False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        for delta in iter(self.next_delta, None):
            if delta.text:
                return delta.text
        raise StopIteration

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        while (delta := await self.next_delta_async()) is not None:
            if delta.text:
                return delta.text
        raise StopAsyncIteration

    def next_delta(self) -> Delta | None:
        """Wait for what the next step adds to the answer: text, and its token's log-probability; None at the end."""
        if self._ended:
            return None
        self._engine.check_waiting()
        return self._opened(self._request.outbox.get())

    async def next_delta_async(self) -> Delta | None:
        """`next_delta` for `asyncio`: waiting holds up no other task, and a task that is cancelled ends its answer."""
        return None if self._ended else self._opened(await self._arrival())

    def follow(self, told: Callable[[], object]) -> None:
        """Have the running event loop call `told` whenever something comes from now on."""
        self._engine.check_waiting()
        loop = asyncio.get_running_loop()

        def notify() -> None:
            with suppress(RuntimeError):  # a loop that is closed has no reader any more
                loop.call_soon_threadsafe(told)

        self._request.notify = notify

    def arrived(self) -> Iterator[Delta | None]:
        """What has come and was not taken yet, without waiting: deltas, and None behind the last; raises its error."""
        while not self._ended:
            try:
                entry = self._request.outbox.get_nowait()
            except Empty:
                return
            yield self._opened(entry)

    async def _arrival(self) -> Delta | BaseException | None:
        """The outbox's next entry."""
        try:
            while True:
                arrived = asyncio.Event()
                self.follow(arrived.set)
                with suppress(Empty):  # looked for once the engine knows whom to tell, so that none is missed
                    return self._request.outbox.get_nowait()
                await arrived.wait()
        except asyncio.CancelledError:
            self.close()
            raise
        finally:
            self._request.notify = None

    def _opened(self, entry: Delta | BaseException | None) -> Delta | None:
        """What an entry of the outbox brings; raises the error that it is."""
        if isinstance(entry, Delta):
            return entry
        self._ended = True
        if entry is None:
            if self._answered is not None:
                self._answered(self.result)
            return None
        try:
            raise entry
        finally:
            del entry  # its traceback holds this frame

    def wait(self) -> Generation:
        """Read what is still to come and give the whole answer."""
        for _ in self:
            pass
        return self.result

    @property
    def prompt_tokens(self) -> int:
        """How many tokens the prompt has."""
        return self._request.prompt_tokens

    @property
    def reused_tokens(self) -> int:
        """How many of the prompt's tokens had been read before."""
        return self._request.reused

    def close(self) -> None:
        """End the answer within a step."""
        self._request.abandon()

    def __del__(self) -> None:
        self.close()

    @property
    def finished(self) -> bool:
        """Whether the whole answer is there."""
        return self._ended and self._request.answer.finished is not None

    @property
    def result(self) -> Generation:
        """The whole answer; `ArrieroError` while pieces are still to come."""
        if not self.finished:
            raise ArrieroError("the answer is not finished", remedy="Read the stream to its end first")
        return self._request.answer.result()
