"""The answers to one request: handed to the engine, waited for together, and ended when the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.requests import Request as HttpRequest

from arriero.runtimes.generation import Generation
from arriero.runtimes.processor.processor import Prompt
from arriero.runtimes.request import Delta, Request
from arriero.runtimes.server.answer_fields import AnswerFields
from arriero.runtimes.server.errors import RefusalError, failure_of
from arriero.runtimes.server.metrics import Metrics
from arriero.runtimes.server.models import Model
from arriero.runtimes.settings import AnswerSettings
from arriero.runtimes.stream import Stream

CLIENT_GONE = 499  # as others' logs have it; nobody reads the answer


class Load:
    """How many answers are on their way, of how many that may be."""

    def __init__(self, most: int) -> None:
        """Let `most` answers be on their way at once."""
        self.most, self.count, self.stopping = most, 0, False

    def take(self, answers: int) -> None:
        """Count `answers` more, or refuse them."""
        if self.stopping:
            raise RefusalError(503, "The server is stopping.", code="stopping")
        if self.count + answers > self.most:
            raise RefusalError(429, "Too many requests are being answered; try again soon.", code="rate_limit_exceeded")
        self.count += answers

    def give(self, answers: int) -> None:
        """Count `answers` less."""
        self.count -= answers


@dataclass
class Answers:
    """The streams of one request's answers, in order."""

    streams: list[Stream]
    count: int  # answers to each prompt
    metrics: Metrics
    deadline: float  # of the event loop's clock
    failure: str | None = None  # what ended them before their end

    @classmethod
    def begin(cls, asked: AnswerFields, requests: Sequence[Request], metrics: Metrics, deadline: float) -> Answers:
        """Have `requests` answered by the `deadline`."""
        return cls([asked.model.session.submit(one) for one in requests], asked.count, metrics, deadline)

    async def wait(self) -> list[Generation]:
        """Wait for all of them."""
        async for _ in self.deltas():
            pass
        return [stream.result for stream in self.streams]

    async def deltas(self) -> AsyncIterator[tuple[int, Delta | None]]:
        """Every answer's deltas as they come, with its number, and None at its end; TimeoutError after the deadline."""
        loop, news = asyncio.get_running_loop(), asyncio.Queue[int | None]()
        late = loop.call_at(self.deadline, news.put_nowait, None)
        try:
            for number, stream in enumerate(self.streams):
                stream.follow(partial(news.put_nowait, number))
                news.put_nowait(number)  # for what came before
            left = len(self.streams)
            while left:
                told = await news.get()
                if told is None:
                    raise TimeoutError
                for delta in self.streams[told].arrived():
                    if delta is None:
                        left -= 1
                        self.metrics.answered(self.streams[told].result)
                    yield told, delta
        except BaseException as error:
            self.failure = failure_of(error)
            raise
        finally:
            late.cancel()
            self.close()

    @property
    def finished(self) -> bool:
        """Whether all are there."""
        return all(stream.finished for stream in self.streams)

    def close(self) -> None:
        """End what is still on its way, within a step."""
        for stream in self.streams:
            stream.close()

    def usage(self) -> dict[str, Any]:
        """The tokens that were read and chosen, as the API counts them: a prompt once, however often it is answered."""
        firsts = self.streams[:: self.count]
        read = sum(stream.result.prompt_tokens for stream in firsts)
        chosen = sum(len(stream.result.token_ids) for stream in self.streams)
        return {
            "prompt_tokens": read,
            "completion_tokens": chosen,
            "total_tokens": read + chosen,
            "prompt_tokens_details": {"cached_tokens": sum(stream.reused_tokens for stream in firsts)},
        }


def engine_requests(model: Model, prompts: Sequence[Prompt], settings: Sequence[AnswerSettings]) -> list[Request]:
    """What the engine is to answer: each of `prompts` once by each of `settings`."""
    return [model.session.request(prompt, one, model.adapter) for prompt in prompts for one in settings]


async def until_gone(http: HttpRequest, work: Callable[[], Any]) -> Any:
    """What `work`, a coroutine function, gives; it is cancelled when the client leaves."""
    task = asyncio.ensure_future(work())
    watch = asyncio.ensure_future(_gone(http))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RefusalError(CLIENT_GONE, "The client left.")
        return task.result()
    finally:
        watch.cancel()
        task.cancel()


async def _gone(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
