"""The bundles that a server answers from: each is opened when it is first needed, and closed for others' memory.

All but the opening and closing itself runs on the event loop, so that what a bundle's fields say holds until an await.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace

from arriero.errors import ArrieroError, MachineLacks
from arriero.runtimes.scheduler import Stats
from arriero.runtimes.server.errors import RefusalError, refusal_of
from arriero.runtimes.session import Session
from arriero.sizes import human_bytes

log = logging.getLogger("arriero.server")
COUNTED = tuple(one.name for one in fields(Stats) if one.name not in ("running", "waiting", "experts"))


@dataclass
class Bundle:
    """What is known of a bundle whether it is open or not, and its session while it is."""

    name: str
    context: int
    adapters: Sequence[str]
    identity: str
    nbytes: int  # that an open session takes
    opener: Callable[[], Session]
    session: Session | None = None
    users: int = 0  # requests that are answered from it or wait for it
    used: int = 0  # the number of its last request
    opened: int = 0  # times
    past: Stats = field(default_factory=Stats)  # of sessions that were closed

    def open(self) -> None:
        """Open its session, on whatever thread."""
        session = self.opener()
        session.processor.grammars.prepare()  # at once, not while others' answers stream
        self.session = session
        self.opened += 1

    def detach(self) -> Session | None:
        """Take its session away, to be closed; what it did stays counted."""
        self.past, session, self.session = self.stats(), self.session, None
        return session

    def stats(self) -> Stats:
        """What all its sessions did, and what the open one has to do."""
        if self.session is None:
            return replace(self.past, running=0, waiting=0)
        return _sum(self.past, self.session.engine.stats)


class Bundles:
    """The bundles by name, within a budget of memory."""

    def __init__(self, bundles: Sequence[Bundle], budget: int | None = None) -> None:
        """Serve `bundles`; those that are open take `budget` bytes together at most, any number when None."""
        self.by_name, self.budget = {bundle.name: bundle for bundle in bundles}, budget
        self._requests = 0
        self._opening: dict[str, asyncio.Task[None]] = {}
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, "arriero-open")

    @contextmanager
    def using(self, bundle: Bundle) -> Iterator[None]:
        """Keep `bundle` from being closed; it may still have to be opened."""
        self._requests += 1
        bundle.used, bundle.users = self._requests, bundle.users + 1
        try:
            yield
        finally:
            bundle.users -= 1

    async def open(self, bundle: Bundle) -> None:
        """Wait until `bundle`, which is in use, is open. Raises RefusalError where there is no room for it now."""
        if bundle.session is not None:
            return
        if bundle.name not in self._opening:
            task = asyncio.get_running_loop().create_task(self._open(bundle))
            self._opening[bundle.name] = task
            task.add_done_callback(lambda task: self._opened(bundle, task))
        await asyncio.shield(self._opening[bundle.name])  # it goes on for others when this client leaves

    def _opened(self, bundle: Bundle, task: asyncio.Task[None]) -> None:
        del self._opening[bundle.name]
        if not task.cancelled():
            task.exception()  # those who wait for it raise it; where nobody is left, nothing is amiss

    async def _open(self, bundle: Bundle) -> None:
        async with self._turn:
            loop = asyncio.get_running_loop()
            idle = self._make_room(bundle)
            for one, session in [(one, one.detach()) for one in idle]:
                assert session is not None
                log.info("closing %s for %s", one.name, bundle.name)
                await loop.run_in_executor(self._thread, session.close)
            log.info("opening %s", bundle.name)
            try:
                await loop.run_in_executor(self._thread, bundle.open)
            except ArrieroError as error:
                log.error("%s cannot be opened: %s", bundle.name, error)
                if isinstance(error, MachineLacks):
                    raise refusal_of(error) from None
                message = f"The bundle {bundle.name} cannot be opened; the server's log says why."
                raise RefusalError(500, message, code="internal_error") from None

    def _make_room(self, bundle: Bundle) -> list[Bundle]:
        """The bundles to close so that `bundle` fits: those that nobody uses, in the order of their last use."""
        if self.budget is None:
            return []
        open_now = [one for one in self.by_name.values() if one.session is not None]
        idle = sorted((one for one in open_now if not one.users), key=lambda one: one.used)
        over = sum(one.nbytes for one in open_now) + bundle.nbytes - self.budget
        if over > sum(one.nbytes for one in idle):
            busy = ", ".join(one.name for one in open_now if one.users)
            message = f"There is no memory for {bundle.name} while others are in use ({busy}); try again soon."
            raise RefusalError(503, message, code="no_memory")
        closed: list[Bundle] = []
        while over > sum(one.nbytes for one in closed):
            closed.append(idle[len(closed)])
        return closed

    def close(self) -> None:
        """Close every session, also one that is being opened."""
        self._thread.shutdown(cancel_futures=True)
        for bundle in self.by_name.values():
            if (session := bundle.detach()) is not None:
                session.close()


def check_fits(bundles: Sequence[Bundle], budget: int) -> None:
    """Refuse bundles of which one would never fit."""
    large = [f"{one.name} ({human_bytes(one.nbytes)})" for one in bundles if one.nbytes > budget]
    if large:
        raise ArrieroError(
            f"there is no room for {', '.join(large)}",
            expected=f"bundles of at most {human_bytes(budget)} each, which the memory leaves for them",
            remedy="Raise --memory, lower --prefix-cache, or serve smaller bundles",
        )


def _sum(before: Stats, now: Stats) -> Stats:
    """`now`, with what was counted `before`."""
    return replace(now, **{name: getattr(before, name) + getattr(now, name) for name in COUNTED})
