"""One prompt on its way to its answer: what is read and chosen on the engine's thread, what the caller takes of it.

Shapes: S tokens of a piece, H hidden, V vocabulary, M image placeholder tokens, n image tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np

from arriero.runtimes.backend import Backend, Floats, Ints
from arriero.runtimes.generation import Answer, TokenLogprobs
from arriero.runtimes.processor.processor import Prompt
from arriero.runtimes.steps import piece_end


@dataclass(frozen=True)
class Delta:
    """What one step adds to an answer: text that is certain by now, and the chosen token's entry where asked for."""

    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()


class Request:
    """A prompt, the answer in the making, and the outbox between the engine's thread and the caller's."""

    def __init__(self, prompt: Prompt, answer: Answer, adapter: int) -> None:
        """Ask for `answer` to `prompt`, read with the adapter of that number; the caller's context variables hold."""
        self.answer, self.adapter = answer, adapter
        self.ids, self._tiles = prompt.input_ids, prompt.pixel_values
        self.position = 0  # tokens of the prompt that are in the cache
        self._features: Floats | None = None  # [M, H] of the tiles seen so far
        self._tiles_seen = self._features_used = 0
        self._context = copy_context()
        self._abandoned = False
        self.outbox: SimpleQueue[Delta | BaseException | None] = SimpleQueue()
        self.notify: Callable[[], None] | None = None  # called after each entry of the outbox

    @property
    def tokens(self) -> int:
        """Tokens of memory that prompt and answer may come to."""
        return len(self.ids) + self.answer.max_tokens

    @property
    def length(self) -> int:
        """Tokens that the cache holds of it: the last one chosen is still to be appended."""
        return self.position + max(len(self.answer.token_ids) - 1, 0)

    # --- the prompt, piece by piece

    @property
    def tiles_left(self) -> bool:
        """Whether the vision tower has tiles to see before the prompt can be read."""
        return self._tiles is not None and self._tiles_seen < len(self._tiles)

    def see_tiles(self, backend: Backend, most: int) -> None:
        """Let the vision tower see the next tiles, `most` of them."""
        assert self._tiles is not None
        features = backend.vision(self._tiles[self._tiles_seen : self._tiles_seen + most])
        self._tiles_seen += min(most, len(self._tiles) - self._tiles_seen)
        self._features = features if self._features is None else np.concatenate([self._features, features])

    def next_piece(self, backend: Backend, most: int) -> tuple[Ints, Floats]:
        """The next ids [S], at most `most` and inside one attention chunk, with their image features [M, H]."""
        ids = self.ids[self.position : piece_end(backend.spec, self.position, len(self.ids), most)]
        placeholders = int(np.sum(ids == backend.spec.image_token_id))
        features = np.zeros((0, backend.spec.hidden_size), np.float32) if self._features is None else self._features
        used, self._features_used = self._features_used, self._features_used + placeholders
        return ids, features[used : used + placeholders]

    # --- the answer

    @property
    def cancelled(self) -> bool:
        """Whether the caller wants no more of it."""
        return self._abandoned or self.answer.cancelled

    def abandon(self) -> None:
        """Let the engine stop within a step; for the caller's side."""
        self._abandoned = True

    def take(self, logits: Floats) -> None:
        """Choose the token that follows from `logits` [V]. Raises what a caller's own processor of logits raises."""
        before = len(self.answer.logprobs)
        text = self._context.run(self.answer.take, logits)
        self._put(Delta(text, tuple(self.answer.logprobs[before:])))
        if self.answer.finished is not None:
            self._put(None)

    def cancel(self) -> None:
        """End the answer where it is."""
        self._put(Delta(self.answer.cancel()))
        self._put(None)

    def fail(self, error: BaseException) -> None:
        """End with `error`, which the caller raises."""
        self._put(error)

    def _put(self, entry: Delta | BaseException | None) -> None:
        self.outbox.put(entry)
        if (notify := self.notify) is not None:
            notify()
