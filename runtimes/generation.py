"""One answer in the making: each new token is chosen, turned to text, and checked against the reasons to stop."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

from arriero.runtimes.backend import Floats, Ints, ModelSpec
from arriero.runtimes.draw import top_log_probabilities
from arriero.runtimes.grammar import Constraint
from arriero.runtimes.processor.detokenize import Decode, Detokenizer, Piece
from arriero.runtimes.sampler import Sampler
from arriero.runtimes.settings import AnswerSettings
from arriero.runtimes.stop_text import StopText

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class TokenLogprobs:
    """A chosen token's log-probability under the model, and the likeliest tokens with theirs, likeliest first.

    `in_text` is False for a token of which the answer's text has nothing: what closes it, and control tokens.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    in_text: bool = True


@dataclass(frozen=True)
class Generation:
    """A finished answer.

    `token_ids` holds every token chosen, a closing one included. `ttft_s` runs from the call to the first token,
    whatever else is answered meanwhile included, `decode_s` from there to the last. `logprobs` has one entry for each
    token where they were asked for. `stop_text` is the one of `stop` that ended it, None where something else did.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    ttft_s: float
    decode_s: float
    logprobs: tuple[TokenLogprobs, ...] | None = None
    stop_text: str | None = None

    @property
    def token_s(self) -> float | None:
        """Mean seconds from one token to the next; None for less than two."""
        return self.decode_s / (len(self.token_ids) - 1) if len(self.token_ids) > 1 else None


class Answer:
    """One row's answer: feed it logits with `take`, read `finished`, then `result`."""

    def __init__(
        self,
        spec: ModelSpec,
        decode: Decode,
        settings: AnswerSettings,
        max_tokens: int,
        prompt_ids: Ints,
        constraint: Constraint | None = None,
    ) -> None:
        """Start an answer of at most `max_tokens` to a prompt with `prompt_ids`; its clock starts now.

        `constraint` keeps it to the form that `settings` name.

        Raises `ArrieroError` for settings that name tokens the model does not know.
        """
        settings.check_vocabulary(spec.vocab_size)
        self._limits, self._output = settings.limits, settings.output
        # an image placeholder in an answer would have no image behind it
        self._sampler = Sampler(settings.sampling, prompt_ids, never=spec.image_token_id, constraint=constraint)
        self._closing = {*spec.eos_token_ids, *settings.limits.stop_token_ids}
        self._detokenizer = Detokenizer(decode, settings.output.skip_special_tokens)
        self._text = StopText(settings.limits.stop, settings.output.skip_special_tokens)
        self.max_tokens, self._prompt_tokens = max_tokens, len(prompt_ids)
        self._pieces: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finished: FinishReason | None = None
        self._started = time.perf_counter()
        self._first: float | None = None
        self._last = self._started

    def take(self, logits: Floats) -> str:
        """Choose the next token from `logits` [V] and give the text that is now certain; may set `finished`."""
        token = self._sampler.choose(logits)
        self.token_ids.append(token)
        closing = token in self._closing
        special = (closing or self._output.logprobs is not None) and self._detokenizer.is_special(token)
        if self._output.logprobs is not None:
            ids, logprobs, log_sum = top_log_probabilities(logits, self._output.logprobs)
            top = tuple(zip(ids.tolist(), logprobs.tolist(), strict=True))
            in_text = not (self._output.skip_special_tokens if special else closing)
            self.logprobs.append(TokenLogprobs(token, float(logits[token]) - log_sum, top, in_text))
        self._last = time.perf_counter()
        self._first = self._first or self._last
        if not closing or special:
            # what an ordinary token says that closes the answer is left out, as a stop text is
            self._say(self._detokenizer.push(token))
        if closing:
            return self._close("stop")
        if self._text.stopped:
            return self._emit("stop")
        if len(self.token_ids) >= self.max_tokens:
            return self._close("length")
        piece = self._text.take()
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
            logprobs=None if self._output.logprobs is None else tuple(self.logprobs),
            stop_text=self._text.stopped_by,
        )

    def _close(self, reason: FinishReason) -> str:
        self._say(self._detokenizer.flush())
        return self._emit("stop" if self._text.stopped else reason)

    def _say(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            self._text.push(piece)

    def _emit(self, reason: FinishReason) -> str:
        self.finished, piece = reason, self._text.rest()
        self._pieces.append(piece)
        return piece
