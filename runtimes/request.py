"""One prompt on its way to its answer: what is read and chosen on the engine's thread, what the caller takes of it.

Shapes: S tokens of a piece, H hidden, V vocabulary, M image placeholder tokens, n image tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import copy_context
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import chain
from queue import SimpleQueue

import numpy as np

from arriero.runtimes.backend import Backend, Floats, Ints, ModelSpec
from arriero.runtimes.draft_length import DraftLength
from arriero.runtimes.generation import Answer, TokenLogprobs
from arriero.runtimes.place import Place
from arriero.runtimes.prefix_cache import Tokens
from arriero.runtimes.processor.processor import Prompt
from arriero.runtimes.snapshot import Snapshot
from arriero.runtimes.steps import piece_end


@dataclass(frozen=True)
class Delta:
    """What one step adds to an answer: text that is certain by now, and the chosen tokens' entries where asked for."""

    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()


def joined(deltas: Sequence[Delta]) -> Delta:
    """What several tokens of one step add."""
    return Delta("".join(delta.text for delta in deltas), tuple(chain.from_iterable(one.logprobs for one in deltas)))


def read_tokens(prompt: Prompt, adapter: int, spec: ModelSpec) -> Tokens:
    """What `prompt`, read with the adapter of that number, is made of."""
    tiles = () if prompt.pixel_values is None else prompt.pixel_values
    hashes = tuple(blake2b(np.ascontiguousarray(tile).tobytes(), digest_size=32).digest() for tile in tiles)
    per_tile = 1 if spec.vision is None else spec.vision.tokens_per_tile
    return Tokens(prompt.input_ids, np.flatnonzero(prompt.input_ids == spec.image_token_id), hashes, per_tile, adapter)


class Request:
    """A prompt, the answer in the making, and the outbox between the engine's thread and the caller's."""

    def __init__(self, prompt: Prompt, answer: Answer, adapter: int, spec: ModelSpec) -> None:
        """Ask for `answer` to `prompt`, read with the adapter of that number; the caller's context variables hold."""
        self.answer = answer
        self.tokens = read_tokens(prompt, adapter, spec)
        self._tiles, self.prompt_tokens = prompt.pixel_values, len(prompt.input_ids)
        self._paused_at = 0  # tokens of the answer that are among `tokens`: read as a prompt is, since it was paused
        self.position = 0  # of `tokens`, how many the cache has
        self.reused = 0  # of those, the ones that had been read before
        self._features: list[Floats] = []  # [M, H] of the tiles seen so far
        self.number = 0  # in the order of arrival
        self._context = copy_context()
        self.drafts: DraftLength | None = None  # where answers are drafted
        self.place: Place | None = None  # of a conversation that the prompt goes on with
        self.keeps_place = False
        self.kept: Snapshot | None = None  # the row at the end, where the caller keeps its place
        self._abandoned = False
        self.outbox: SimpleQueue[Delta | BaseException | None] = SimpleQueue()
        self.notify: Callable[[], None] | None = None  # called after each entry of the outbox

    @property
    def ids(self) -> Ints:
        """What is to be read before the next token can be chosen [S]."""
        return self.tokens.ids

    @property
    def length(self) -> int:
        """Tokens that the cache holds of it: the last one chosen is still to be appended."""
        return self.position + max(len(self.answer.token_ids) - self._paused_at - 1, 0)

    @property
    def tokens_held(self) -> Tokens:
        """The tokens that the cache holds of it."""
        answered = np.array(self.answer.token_ids[self._paused_at : -1], np.int64)
        return replace(self.tokens, ids=np.concatenate([self.ids[: self.position], answered]))

    def tokens_from(self, start: int) -> Ints:
        """The tokens of prompt and answer from the one of that number on, those included that the cache lacks."""
        answered, prompt = self.answer.token_ids[self._paused_at :], len(self.ids)
        if start >= prompt:
            return np.array(answered[start - prompt :], np.int64)
        return np.concatenate([self.ids[start:], np.array(answered, np.int64)])

    def tokens_soon(self, ahead: int) -> int:
        """Tokens of memory that it comes to within `ahead` more of its answer."""
        left = self.answer.max_tokens - len(self.answer.token_ids)
        return max(len(self.ids), self.length) + min(left, ahead)

    def pause(self) -> None:
        """Give up what the cache holds: prompt and answer so far are to be read again."""
        answered = np.array(self.answer.token_ids[self._paused_at :], np.int64)
        self.tokens = replace(self.tokens, ids=np.concatenate([self.ids, answered]))
        self._paused_at, self.position, self._features = len(self.answer.token_ids), 0, []

    # --- the prompt, piece by piece

    @property
    def tiles_left(self) -> bool:
        """Whether the vision tower has tiles to see before the prompt can be read."""
        return len(self._features) < len(self.tokens.tiles)

    def see_tile(self, see: Callable[[bytes, Floats], Floats]) -> None:
        """Have the next tile seen: `see` gives the features of a hash and a tile f32 [1, 3, h, w].

        One at a time, whatever else is to be done: in a group a tile's last bits would depend on the others.
        """
        assert self._tiles is not None
        number = len(self._features)
        self._features.append(see(self.tokens.tiles[number], self._tiles[number : number + 1]))

    def skip(self, length: int) -> None:
        """Take the first `length` tokens as read: the cache has them."""
        self.position = length
        if not self._paused_at:
            self.reused = length
        first = int(np.searchsorted(self.tokens.placeholders, length))
        whole = first // self.tokens.per_tile if self.tokens.tiles else 0
        self._features = [np.zeros((0, 0), np.float32)] * whole  # of tiles that are read to their end

    def next_piece(self, backend: Backend, most: int) -> tuple[Ints, Floats]:
        """The next ids [S], at most `most` and inside one attention chunk, with their image features [M, H]."""
        end = piece_end(backend.spec, self.position, len(self.ids), most, backend.few_rows)
        first, stop = np.searchsorted(self.tokens.placeholders, (self.position, end)).tolist()
        if first == stop:
            return self.ids[self.position : end], np.zeros((0, backend.spec.hidden_size), np.float32)
        tile, last = first // self.tokens.per_tile, (stop - 1) // self.tokens.per_tile
        features = np.concatenate(self._features[tile : last + 1])
        skipped = first - tile * self.tokens.per_tile
        return self.ids[self.position : end], features[skipped : skipped + stop - first]

    # --- the answer

    def draft_room(self, most: int, chunk: int) -> int:
        """How many tokens behind the last one, at most `most`, may be checked in its step; may be less than none.

        They stay below the edge of the attention chunk, so that the cache can be cut back to those that were right.
        """
        left = self.answer.max_tokens - len(self.answer.token_ids) - 1
        return min(most, left, chunk - self.length % chunk - 2)

    @property
    def cancelled(self) -> bool:
        """Whether the caller wants no more of it."""
        return self._abandoned or self.answer.cancelled

    def abandon(self) -> None:
        """Let the engine stop within a step; for the caller's side."""
        self._abandoned = True

    def choose(self, logits: Floats) -> Delta:
        """Choose the token that follows from `logits` [V]. Raises what a caller's own processor of logits raises."""
        before = len(self.answer.logprobs)
        text = self._context.run(self.answer.take, logits)
        return Delta(text, tuple(self.answer.logprobs[before:]))

    def deliver(self, delta: Delta) -> None:
        """Hand `delta` to the caller, and the end behind it where the answer is finished."""
        self._put(delta)
        if self.answer.finished is not None:
            self._put(None)

    def cancel(self) -> Delta:
        """End the answer where it is; gives what is left of its text."""
        return Delta(self.answer.cancel())

    def fail(self, error: BaseException) -> None:
        """End with `error`, which the caller raises."""
        self._put(error)

    def _put(self, entry: Delta | BaseException | None) -> None:
        self.outbox.put(entry)
        if (notify := self.notify) is not None:
            notify()
