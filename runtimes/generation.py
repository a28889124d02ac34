"""One answer in the making: each new token is chosen, turned to text, and checked against the reasons to stop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from arriero.errors import ArrieroError
from arriero.runtimes.backend import Floats, ModelSpec
from arriero.runtimes.processor.detokenize import Detokenizer
from arriero.runtimes.sampling import Sampling
from arriero.runtimes.settings import Limits

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Generation:
    """A finished answer.

    `token_ids` holds every token chosen, a closing one included. `ttft_s` runs from the call to the first token,
    `decode_s` from there to the last; rows of a batch share these clocks.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    ttft_s: float
    decode_s: float


class Answer:
    """One row's answer: feed it logits with `take`, read `finished`, then `result`."""

    def __init__(
        self,
        spec: ModelSpec,
        detokenizer: Detokenizer,
        sampling: Sampling,
        limits: Limits,
        max_tokens: int,
        prompt_tokens: int,
    ) -> None:
        """Start an answer of at most `max_tokens` to a prompt of `prompt_tokens`; its clock starts now."""
        self._spec, self._detokenizer, self._sampling, self._limits = spec, detokenizer, sampling, limits
        self._random = sampling.generator()
        self.max_tokens, self._prompt_tokens = max_tokens, prompt_tokens
        self._pieces: list[str] = []
        self._held = ""
        self.token_ids: list[int] = []
        self.finished: FinishReason | None = None
        self._started = time.perf_counter()
        self._first: float | None = None
        self._last = self._started

    def take(self, logits: Floats) -> str:
        """Choose the next token from `logits` [V] and give the text that is now certain; may set `finished`."""
        if self._spec.image_token_id is not None:
            # an image placeholder in an answer would have no image behind it
            logits = logits.copy()
            logits[self._spec.image_token_id] = -np.inf
        token = self._sampling.choose(logits, self._random)
        self.token_ids.append(token)
        self._last = time.perf_counter()
        self._first = self._first or self._last
        if token in self._spec.eos_token_ids:
            return self._close("stop")
        self._held += self._detokenizer.push(token)
        if self._cut():
            return self._emit("stop")
        if len(self.token_ids) >= self.max_tokens:
            return self._close("length")
        keep = max((_overlap(self._held, text) for text in self._limits.stop), default=0)
        piece = self._held[: len(self._held) - keep]
        self._held = self._held[len(piece) :]
        self._pieces.append(piece)
        return piece

    @property
    def cancelled(self) -> bool:
        """Whether the caller asked to cancel."""
        return self._limits.cancel is not None and self._limits.cancel.is_set()

    def cancel(self) -> str:
        """End the answer at once and give the text held back."""
        return self._close("cancelled")

    def result(self) -> Generation:
        """Give the finished answer."""
        assert self.finished is not None
        first = self._first or self._last
        return Generation(
            text="".join(self._pieces),
            token_ids=self.token_ids,
            finish_reason=self.finished,
            prompt_tokens=self._prompt_tokens,
            ttft_s=first - self._started,
            decode_s=self._last - first,
        )

    def _close(self, reason: FinishReason) -> str:
        self._held += self._detokenizer.flush()
        return self._emit("stop" if self._cut() else reason)

    def _emit(self, reason: FinishReason) -> str:
        self.finished, piece, self._held = reason, self._held, ""
        self._pieces.append(piece)
        return piece

    def _cut(self) -> bool:
        """Cut the held text before its earliest stop text, if it has one."""
        places = [place for text in self._limits.stop if (place := self._held.find(text)) >= 0]
        if places:
            self._held = self._held[: min(places)]
        return bool(places)


class Stream(Iterator[str]):
    """The pieces of an answer as they come; `result` holds the whole `Generation` once they have all been read."""

    def __init__(self, pieces: Iterator[str], answer: Answer) -> None:
        """Give the `pieces` of `answer`."""
        self._pieces, self._answer = pieces, answer

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def result(self) -> Generation:
        """The whole answer; `ArrieroError` while pieces are still to come."""
        if self._answer.finished is None:
            raise ArrieroError("the answer is not finished", remedy="Read the stream to its end first")
        return self._answer.result()


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
