"""Which step comes next: requests are admitted, read in pieces between decode steps, decoded together, and ended.

Everything runs on the engine's thread, one `turn` after another, so nothing is locked. A row's error ends that row's
request alone. Shapes: B rows that decode, V vocabulary.
"""

from __future__ import annotations

import operator
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from arriero.runtimes.backend import Backend, Between, Cache, CacheStatistics, Floats, ModelSpec, StepGivenUp
from arriero.runtimes.decode_step import Outcome, decode_rows, draft_tokens
from arriero.runtimes.draft_length import DraftLength
from arriero.runtimes.draft_model import DraftModel
from arriero.runtimes.interlude import Interlude, no_step
from arriero.runtimes.pace import Pace
from arriero.runtimes.prefix_cache import PrefixCache
from arriero.runtimes.prompt_lookup import PromptLookup
from arriero.runtimes.request import Delta, Request, joined
from arriero.runtimes.running_rows import RunningRows
from arriero.runtimes.steps import (
    append_beside,
    check_finite,
    is_preemptible,
    least_piece,
    look_preempted,
    packs_rows,
    read_piece,
    read_preempted,
)

News = Callable[[], None]  # hands a caller what a step brought
AHEAD = 256  # tokens of an answer that there is room for when its request is admitted


@dataclass(frozen=True)
class EngineLimits:
    """How much may be held at once: `rows` requests, each of `context` tokens, all of `tokens` (None: any number).

    A request is admitted with some room for its answer. Where answers outgrow the tokens, the newest request
    waits again and is read anew once there is room; its answer goes on where it was.

    `prefix_bytes` are for prefixes that were read before and features of pictures; 0 keeps none. `speculate` tokens of
    an answer are drafted at most, by a draft model or else from what was said, and checked in one step; 0 drafts none.
    """

    rows: int = 32
    context: int = 1 << 20
    tokens: int | None = None
    prefix_bytes: int = 0
    speculate: int = 0


@dataclass
class Stats:
    """What an engine has done since it was opened, and what it has to do."""

    prefilled_tokens: int = 0
    reused_tokens: int = 0  # of prompts, which the prefix cache had
    generated_tokens: int = 0
    drafted_tokens: int = 0  # that were guessed, and those of them that were chosen
    accepted_tokens: int = 0
    failed_drafts: int = 0  # times that the draft model raised an error; the answers went on without it
    steps: int = 0  # decode steps, each of all rows that decode
    finished: int = 0
    paused: int = 0  # times that a request gave its memory to elder ones, to be read again
    running: int = 0
    waiting: int = 0
    experts: CacheStatistics = field(default_factory=CacheStatistics)


class Scheduler:
    """The requests of one backend."""

    def __init__(self, spec: ModelSpec, limits: EngineLimits, draft: DraftModel | None = None) -> None:
        """Keep to `limits`; a request beyond the tokens runs alone. `draft` drafts answers, else their own words do."""
        self._draft_model = draft
        self.limits, self.stats, self._image_token = limits, Stats(), spec.image_token_id
        self._prefixes = PrefixCache(spec, limits.prefix_bytes) if limits.prefix_bytes else None
        self._rows = RunningRows(limits.rows, limits.context)
        self._waiting: deque[Request] = deque()
        self._reading: Request | None = None
        self._pace = Pace()
        self._added = 0

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._waiting or self._reading or self._rows.decoding)

    def add(self, request: Request) -> None:
        """Take `request` in; it is served after those that came before."""
        self._added += 1
        request.number = self._added
        if self.limits.speculate:
            most, looks_up = self.limits.speculate, self._draft_model is None
            request.drafts = PromptLookup(request.ids, most, self._image_token) if looks_up else DraftLength(most)
        self._waiting.append(request)

    def turn(self, backend: Backend) -> None:
        """Take the next steps: at most one piece of a prompt, and a token for every row that decodes.

        Both are one step where the backend packs rows and the prompt has no more: weights are then read once for all
        of them. Where a piece can be left between its parts, rows get a token there too when they have waited enough.
        """
        self._end_cancelled()
        self._admit(backend)
        self._make_room()
        reading = self._reading
        if reading is None or not self._read_beside(backend, reading):
            if reading is not None:
                self._read(backend, reading)
            if self._rows.decoding:
                self._decode(backend)
        self._tidy()

    def fail(self, error: BaseException) -> None:
        """End every request with `error`."""
        everyone = [*self._rows.decoding, *([self._reading] if self._reading else []), *self._waiting]
        self._reading = None
        self._waiting.clear()
        self._drop_caches()
        self._tell([partial(request.fail, error) for request in everyone])

    def _tell(self, news: list[News]) -> None:
        """Hand callers what has come, once it shows in `stats`: whoever has an end finds no such answer running."""
        self._tidy()
        for tell in news:
            tell()
        news.clear()  # an error's traceback holds the frame that has the list

    def _tidy(self) -> None:
        self.stats.running = len(self._rows.decoding) + (self._reading is not None)
        self.stats.waiting = len(self._waiting)
        if self._draft_model is not None:
            self.stats.failed_drafts = self._draft_model.failures
        if self.idle:
            self._drop_caches()

    def _drop_caches(self) -> None:
        self._rows.drop()
        if self._draft_model is not None:
            self._draft_model.drop()

    def _end_cancelled(self) -> None:
        news: list[News] = []
        for request in [request for request in self._waiting if request.cancelled]:
            self._waiting.remove(request)
            news.append(partial(request.deliver, request.cancel()))
        if (reading := self._reading) is not None and reading.cancelled:
            self._stop_reading()
            news.append(partial(reading.deliver, reading.cancel()))
        self._tell(news)
        self._end_cancelled_rows()

    def _end_cancelled_rows(self) -> None:
        news: list[News] = []
        for row in reversed(range(len(self._rows.decoding))):
            if (request := self._rows.decoding[row]).cancelled:
                try:
                    if request.keeps_place:
                        request.kept = self._rows.cache.snapshot(row)
                    news.append(partial(request.deliver, request.cancel()))
                except BaseException as error:
                    news.append(partial(request.fail, error))
                self._rows.remove(row)
        self._tell(news)

    def _admit(self, backend: Backend) -> None:
        """Begin to read the first that waits, where a row and its tokens are free: nobody overtakes it."""
        if self._reading is not None or not self._waiting:
            return
        running = self._rows.decoding
        soon = sum(request.tokens_soon(AHEAD) for request in (*running, self._waiting[0]))
        if len(running) >= self.limits.rows or (running and soon > (self.limits.tokens or soon)):
            return
        request = self._reading = self._waiting.popleft()
        try:
            self._rows.open(backend, request.tokens.adapter, request.tokens_soon(AHEAD))
            self._reuse(backend, request)
        except BaseException as error:
            self._fail_reading(request, error)

    def _make_room(self) -> None:
        """Pause the newest requests where the next tokens of all would not fit; the eldest always goes on."""
        while self._lacks_room():
            newest = self._reading or max(self._rows.decoding, key=lambda request: request.number)
            if newest is self._reading:
                self._stop_reading()
            else:
                row = self._rows.decoding.index(newest)
                self._keep(newest, self._rows.cache.rows(row, row + 1))
                self._rows.remove(row)
            newest.pause()
            self._waiting.appendleft(newest)
            self.stats.paused += 1

    def _lacks_room(self) -> bool:
        """Whether the next tokens of all that run would not fit."""
        running = [*self._rows.decoding, *([self._reading] if self._reading else [])]
        if self.limits.tokens is None or not self._rows.decoding or len(running) == 1:
            return False
        return sum(request.tokens_soon(1 + self.limits.speculate) for request in running) > self.limits.tokens

    def _stop_reading(self) -> None:
        self._reading = None
        self._rows.abandon_reading()

    def _fail_reading(self, request: Request, error: BaseException) -> None:
        self._stop_reading()
        self._tell([partial(request.fail, error)])

    def _read(self, backend: Backend, request: Request) -> None:
        """Read one piece of the prompt, or let the vision tower see one of its tiles."""
        if request.tiles_left:
            self._read_tile(backend, request)
            return
        try:
            ids, features = request.next_piece(backend, self._most(backend))
        except BaseException as error:
            self._fail_reading(request, error)
            return
        last, row = np.array([len(ids) - 1]), self._rows.reading
        interlude, is_left = self._interlude(backend, request), is_preemptible(backend)
        has_others, started = bool(self._rows.decoding), time.perf_counter()
        try:
            if is_left:
                logits = read_preempted(backend, ids, features, row, last, interlude)[0]
            else:
                logits = read_piece(backend, ids, features, row, last).logits[0, 0]
            if not (is_left and has_others):  # whose steps are in the time
                self._pace.read(len(ids), time.perf_counter() - started)
        except StepGivenUp:
            pass  # the next turn ends it with all others that are cancelled
        except BaseException as error:
            self._fail_reading(request, error)
        else:
            self._read_on(request, len(ids), logits, interlude if self._rows.decoding else no_step)
        interlude.check()

    def _read_tile(self, backend: Backend, request: Request) -> None:
        """Let the vision tower see the next tile of the prompt; where it can be left, rows get tokens meanwhile."""
        interlude, look = self._interlude(backend, request), backend.vision
        if is_preemptible(backend):
            look = partial(look_preempted, backend, between=interlude)
        try:
            request.see_tile(partial(self._see, look))
        except StepGivenUp:
            pass  # the next turn ends it, as in `_read`
        except BaseException as error:
            self._fail_reading(request, error)
        interlude.check()

    def _most(self, backend: Backend) -> int:
        """Tokens of the next piece of a prompt at most."""
        if not self._rows.decoding or is_preemptible(backend):
            return backend.piece
        return min(max(self._pace.piece(), least_piece(backend)), backend.piece)

    def _interlude(self, backend: Backend, request: Request) -> Interlude:
        """What comes between parts of what is read of `request`."""
        return Interlude(self._pace, partial(self._decode_between, backend), lambda: request.cancelled)

    def _decode_between(self, backend: Backend) -> bool:
        """Take a decode step between two parts of a piece of the prompt; gives whether anybody waits for the next."""
        self._end_cancelled_rows()
        if self._rows.decoding and not self._lacks_room():
            self._decode(backend)
        return bool(self._rows.decoding)

    def _read_beside(self, backend: Backend, request: Request) -> bool:
        """Read one piece of the prompt in the same step in which all others decode, where backend and prompt allow it.

        Gives False, with nothing changed, where it is not to be or fails: steps of their own then show whose fault it
        is.
        """
        if not self._rows.decoding or request.tiles_left or not packs_rows(backend):
            return False
        most = min(self._pace.piece(), backend.piece)
        if is_preemptible(backend) and len(request.ids) - request.position > most:
            return False  # in so small a piece most experts would be read for a few tokens each, again and again
        tokens, cache = [other.answer.token_ids[-1] for other in self._rows.decoding], self._rows.together
        started = time.perf_counter()
        try:
            ids, features = request.next_piece(backend, most)
            logits = append_beside(backend, tokens, ids, features, cache)
        except Exception:
            return False
        self._pace.read_beside(len(ids), time.perf_counter() - started)
        self.stats.steps += 1
        self._take_all([[]] * len(tokens), list(logits[:-1, None]))
        self._read_on(request, len(ids), logits[-1])
        return True

    def _read_on(self, request: Request, count: int, logits: Floats, between: Between = no_step) -> None:
        """Go on after `count` more tokens of the prompt, which `logits` [V] follow; after the last it decodes.

        `between` is called before keys and values are kept, and between the blocks of them.
        """
        try:
            check_finite(logits)
            request.position += count
            self.stats.prefilled_tokens += count
            if request.position < len(request.ids):
                if (prefixes := self._shared(request)) is not None:
                    between()
                    prefixes.save_piece(request.tokens_held, self._rows.reading, count, len(request.ids), between)
                return
            news = self._take(request, [logits], [], self._rows.reading, between)
            if goes_on := request.answer.finished is None:
                self._tell([news])  # the first token waits for nothing else
                self._keep(request, self._rows.reading, between)
        except BaseException as error:
            self._fail_reading(request, error)
            return
        self._reading = None
        if goes_on:
            self._rows.join(request)
        else:
            self._rows.abandon_reading()
            self._tell([news])

    def _reuse(self, backend: Backend, request: Request) -> None:
        """Begin where the conversation's own place, or the prefix cache, has the prompt read to."""
        place, row = request.place, self._rows.reading
        kept = place.shared(request.ids) if place and place.snapshot.adapter == request.tokens.adapter else 0
        rest = least_piece(backend)
        snapshot = self._prefixes.find(request.tokens, rest) if self._prefixes is not None else None
        length = snapshot.length if snapshot is not None else 0
        if place is not None and kept >= max(length, 1):
            row.restore(0, place.snapshot)
            row.truncate(0, kept)
        elif snapshot is not None:
            row.restore(0, snapshot)
        request.skip(max(kept, length))
        self.stats.reused_tokens += request.position

    def _keep(self, request: Request, row: Cache, between: Between = no_step) -> None:
        """Keep what `row` holds of `request` for others that begin like it.

        `between` is called before that, and between its blocks.
        """
        if (prefixes := self._shared(request)) is not None:
            between()
            prefixes.save(request.tokens_held, row, between)

    def _shared(self, request: Request) -> PrefixCache | None:
        """Where what is read of `request` is kept for others; a conversation has its own place."""
        return self._prefixes if request.place is None else None

    def _end(self, request: Request, row: Cache, between: Between) -> None:
        """Keep what others, or the conversation itself, may go on from; `between` as in `_keep`."""
        if request.keeps_place:
            request.kept = row.snapshot(0)
        else:
            self._keep(request, row, between)

    def _see(self, look: Callable[[Floats], Floats], name: bytes, tile: Floats) -> Floats:
        """The features [M, H] of a tile f32 [1, 3, h, w]: those that `look` gives, where nobody has shown it lately."""
        features = self._prefixes.features(name) if self._prefixes is not None else None
        if features is None:
            features = look(tile)
            if self._prefixes is not None:
                self._prefixes.save_features(name, features)
        return features

    def _take(
        self,
        request: Request,
        logits: Iterable[Floats],
        drafted: Sequence[int],
        row: Cache,
        between: Between = no_step,
    ) -> News:
        """Choose the tokens that follow the last one in `row` before what is `drafted`, and each of those.

        `logits` [V] are taken in turn, up to the first token that is not what was drafted. Gives what hands the tokens
        over. `between` is called between the blocks that are kept of one that has ended.
        """
        deltas: list[Delta] = []
        for one, guess in zip(logits, [*drafted, None], strict=True):
            deltas.append(request.choose(one))
            if request.answer.finished is not None or request.answer.token_ids[-1] != guess:
                break
        if drafted:
            self._cut_back(request, drafted, len(deltas), row)
        if request.answer.finished is not None:
            self._end(request, row, between)
        self.stats.generated_tokens += len(deltas)
        self.stats.finished += request.answer.finished is not None
        return partial(request.deliver, joined(deltas))

    def _cut_back(self, request: Request, drafted: Sequence[int], chosen: int, row: Cache) -> None:
        """Leave in `row` what was right of `drafted`, after which `chosen` tokens were chosen."""
        row.truncate(0, request.length)
        accepted = sum(map(operator.eq, drafted, request.answer.token_ids[-chosen:]))
        self.stats.drafted_tokens += len(drafted)
        self.stats.accepted_tokens += accepted
        assert request.drafts is not None
        request.drafts.learn(len(drafted), accepted)

    def _decode(self, backend: Backend) -> None:
        """Append one token to every row that decodes, and what is drafted to follow it, and choose the next."""
        requests = self._rows.decoding
        # a prompt that is being read has what time there is
        most = 0 if self._reading is not None else self.limits.speculate
        drafts = draft_tokens(backend, requests, most, self._draft)
        started = time.perf_counter()
        outcomes = decode_rows(backend, requests, drafts, self._rows.cache)
        if not any(drafts):
            self._pace.decoded(time.perf_counter() - started)
        self.stats.steps += 1
        self._take_all(drafts, outcomes)

    def _draft(self, rooms: Sequence[int]) -> list[list[int]]:
        """What is guessed to follow each row that decodes, of each at most as many tokens as there is room for."""
        requests, model = self._rows.decoding, self._draft_model
        if model is not None:
            return model.draft(requests, rooms, model.backend.piece if len(requests) == 1 else self._pace.piece())
        drafts: list[list[int]] = []
        for request, room in zip(requests, rooms, strict=True):
            assert isinstance(request.drafts, PromptLookup)
            drafts.append(request.drafts.draft(request.answer.token_ids, room))
        return drafts

    def _take_all(self, drafts: Sequence[Sequence[int]], outcomes: list[Outcome]) -> None:
        """Choose and hand over each decoding row's next tokens by its logits, or end it by its error."""
        ended: list[int] = []
        news: list[News] = []
        for row, (request, draft, outcome) in enumerate(zip(self._rows.decoding, drafts, outcomes, strict=True)):
            try:
                if isinstance(outcome, BaseException):
                    raise outcome
                # a step that was taken apart has no drafts
                checked = draft[: len(outcome) - 1]
                sound = map(check_finite, outcome)  # in turn: what lies behind a wrong draft is nobody's
                news.append(self._take(request, sound, checked, self._rows.cache.rows(row, row + 1)))
            except BaseException as error:
                news.append(partial(request.fail, error))
                ended.append(row)
            else:
                if request.answer.finished is not None:
                    ended.append(row)
        outcomes.clear()  # an error's traceback holds this frame
        for row in reversed(ended):
            self._rows.remove(row)
        self._tell(news)
