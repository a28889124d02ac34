"""Which step comes next: requests are admitted, read in pieces between decode steps, decoded together, and ended.

Everything runs on the engine's thread, one `turn` after another, so nothing is locked. A row's error ends that row's
request alone. Shapes: B rows that decode, V vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import numpy as np

from arriero.runtimes.backend import TILES_AT_ONCE, Backend, Floats
from arriero.runtimes.pace import Pace
from arriero.runtimes.request import Request
from arriero.runtimes.running_rows import RunningRows
from arriero.runtimes.steps import append_tokens, check_finite, read_piece
from arriero.traits import PREFILL_PIECE


@dataclass(frozen=True)
class EngineLimits:
    """How many requests may run at once, how long each may be, and how many tokens all may come to (None: any)."""

    rows: int = 32
    context: int = 1 << 20
    tokens: int | None = None


@dataclass
class Stats:
    """What an engine has done since it was opened, and what it has to do."""

    prefilled_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0  # decode steps, each of all rows that decode
    finished: int = 0
    running: int = 0
    waiting: int = 0


class Scheduler:
    """The requests of one backend."""

    def __init__(self, limits: EngineLimits) -> None:
        """Keep to `limits`; a request beyond the tokens runs alone."""
        self.limits, self.stats = limits, Stats()
        self._rows = RunningRows(limits.rows, limits.context)
        self._waiting: deque[Request] = deque()
        self._reading: Request | None = None
        self._pace = Pace()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._waiting or self._reading or self._rows.decoding)

    def add(self, request: Request) -> None:
        """Take `request` in; it is served after those that came before."""
        self._waiting.append(request)

    def turn(self, backend: Backend) -> None:
        """Take the next steps: at most one piece of a prompt, and one token for every row that decodes."""
        self._end_cancelled()
        self._admit(backend)
        if self._reading is not None:
            self._read(backend, self._reading)
        if self._rows.decoding:
            self._decode(backend)
        self._tidy()

    def fail(self, error: BaseException) -> None:
        """End every request with `error`."""
        everyone = [*self._rows.decoding, *([self._reading] if self._reading else []), *self._waiting]
        self._reading = None
        self._waiting.clear()
        self._rows.drop()
        for request in everyone:
            request.fail(error)
        self._tidy()

    def _tidy(self) -> None:
        self.stats.running = len(self._rows.decoding) + (self._reading is not None)
        self.stats.waiting = len(self._waiting)
        if self.idle:
            self._rows.drop()

    def _end_cancelled(self) -> None:
        for request in [request for request in self._waiting if request.cancelled]:
            self._waiting.remove(request)
            request.cancel()
        if self._reading is not None and self._reading.cancelled:
            self._reading.cancel()
            self._stop_reading()
        for row in reversed(range(len(self._rows.decoding))):
            if (request := self._rows.decoding[row]).cancelled:
                request.cancel()
                self._rows.remove(row)

    def _admit(self, backend: Backend) -> None:
        """Begin to read the first that waits, where a row and its tokens are free: nobody overtakes it."""
        if self._reading is not None or not self._waiting:
            return
        running = self._rows.decoding
        held = sum(other.tokens for other in running) + self._waiting[0].tokens
        if len(running) >= self.limits.rows or (running and held > (self.limits.tokens or held)):
            return
        request = self._reading = self._waiting.popleft()
        try:
            self._rows.open(backend, request.adapter)
        except BaseException as error:
            request.fail(error)
            self._stop_reading()

    def _stop_reading(self) -> None:
        self._reading = None
        self._rows.abandon_reading()

    def _read(self, backend: Backend, request: Request) -> None:
        """Read one piece of the prompt, or let the vision tower see some of its tiles."""
        others = bool(self._rows.decoding)
        try:
            if request.tiles_left:
                request.see_tiles(backend, 1 if others else TILES_AT_ONCE)
                return
            ids, features = request.next_piece(backend, self._pace.piece() if others else PREFILL_PIECE)
            started = time.perf_counter()
            last = np.array([len(ids) - 1])
            logits = check_finite(read_piece(backend, ids, features, self._rows.reading, last).logits[0, 0])
            self._pace.read(len(ids), time.perf_counter() - started)
            request.position += len(ids)
            self.stats.prefilled_tokens += len(ids)
            if request.position < len(request.ids):
                return
            self._take(request, logits)
        except BaseException as error:
            request.fail(error)
            self._stop_reading()
            return
        self._reading = None
        if request.answer.finished is None:
            self._rows.join(request)
        else:
            self._rows.abandon_reading()

    def _take(self, request: Request, logits: Floats) -> None:
        request.take(logits)
        self.stats.generated_tokens += 1
        self.stats.finished += request.answer.finished is not None

    def _decode(self, backend: Backend) -> None:
        """Append one token to every row that decodes and choose the next."""
        started = time.perf_counter()
        outcomes = self._append(backend)
        self._pace.decoded(time.perf_counter() - started)
        self.stats.steps += 1
        ended = []
        for row, (request, outcome) in enumerate(zip(self._rows.decoding, outcomes, strict=True)):
            try:
                if isinstance(outcome, BaseException):
                    raise outcome
                self._take(request, check_finite(outcome))
            except BaseException as error:
                request.fail(error)
                ended.append(row)
            else:
                if request.answer.finished is not None:
                    ended.append(row)
        outcomes.clear()  # an error's traceback holds this frame
        for row in reversed(ended):
            self._rows.remove(row)

    def _append(self, backend: Backend) -> list[Floats | BaseException]:
        """Per row the logits [V] after its last token, or why there are none."""
        cache, tokens = self._rows.cache, [request.answer.token_ids[-1] for request in self._rows.decoding]
        try:
            return list(append_tokens(backend, tokens, cache))
        except BaseException as error:
            if len(tokens) == 1:
                return [error]
        # one of them may be to blame: each by itself, from where it stood
        cache.lengths[:] = [request.length for request in self._rows.decoding]
        outcomes: list[Floats | BaseException] = []
        for row, token in enumerate(tokens):
            try:
                outcomes.append(append_tokens(backend, [token], cache.rows(row, row + 1))[0])
            except BaseException as error:
                outcomes.append(error)
        return outcomes
