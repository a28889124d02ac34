"""A model ready to answer: prefill in pieces, decode token by token, generate one answer or a batch of them.

Shapes: S prompt tokens, V vocabulary, B batch rows, H hidden, C attention chunk.
A session holds no state of its own: every call works on its own cache, so threads may share one session.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from types import TracebackType
from typing import Literal, Self, Unpack, overload

import numpy as np

from arriero.errors import ArrieroError
from arriero.runtimes.backend import Backend, Cache, Floats, Ints, StepOutput
from arriero.runtimes.generation import Answer, Generation, Stream
from arriero.runtimes.processor.chat import Message
from arriero.runtimes.processor.pictures import Images, as_list
from arriero.runtimes.processor.processor import Processor, Prompt
from arriero.runtimes.sampling import Sampling
from arriero.runtimes.settings import Limits, Settings, read_settings
from arriero.traits import PREFILL_PIECE

PromptLike = Prompt | str | Sequence[Message]


@dataclass
class State:
    """Where one sequence stands: its cache, and the logits f32 [V] for its next token."""

    cache: Cache
    logits: Floats


class Session:
    """Answers prompts with a backend and a processor."""

    def __init__(
        self, backend: Backend, processor: Processor, context: int | None = None, batch: int | None = None
    ) -> None:
        """Serve sequences of at most `context` tokens (the model's own limit when None), `batch` of them at once."""
        self._backend: Backend | None = backend
        self.processor = processor
        self.spec = backend.spec
        self.context = min(context or self.spec.max_position_embeddings, self.spec.max_position_embeddings)
        self.batch = batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def backend(self) -> Backend:
        """What runs the graphs; `ArrieroError` once the session is closed."""
        if self._backend is None:
            raise ArrieroError("the session is closed", remedy="Load the bundle again")
        return self._backend

    def close(self) -> None:
        """Free the backend; answers still on their way end with an `ArrieroError`."""
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()

    # --- answers

    @overload
    def generate(
        self, prompt: PromptLike, images: Images = None, stream: Literal[False] = False, **settings: Unpack[Settings]
    ) -> Generation: ...

    @overload
    def generate(
        self, prompt: PromptLike, images: Images = None, *, stream: Literal[True], **settings: Unpack[Settings]
    ) -> Stream: ...

    def generate(
        self, prompt: PromptLike, images: Images = None, stream: bool = False, **settings: Unpack[Settings]
    ) -> Generation | Stream:
        """Answer `prompt`: a text, a list of messages, or an encoded `Prompt`.

        How tokens are chosen is `sampling=Sampling(...)`, or its fields as keyword arguments: `temperature` 0, the
        default, is greedy; `seed` makes draws repeatable. The answer ends at the model's closing token, before a
        `stop` text, at `max_tokens` (None fills the context), or soon after `cancel` is set. With `stream`, gives the
        text in pieces as it comes. A prompt or a setting that cannot work is an `ArrieroError` before anything runs.
        """
        encoded = self.encode(prompt, images)
        answer = self._answer(encoded, *read_settings(settings))
        pieces = Stream(self._pieces(encoded, answer), answer)
        if stream:
            return pieces
        for _ in pieces:
            pass
        return pieces.result

    def generate_batch(self, prompts: Sequence[PromptLike], **settings: Unpack[Settings]) -> list[Generation]:
        """Answer several prompts together, at most `batch` at a time, each as `generate` would alone.

        Images come inside messages or encoded prompts. The settings are those of `generate`.
        """
        encoded = [self.encode(prompt) for prompt in prompts]
        sampling, limits = read_settings(settings)
        for prompt in encoded:
            self._room(prompt, limits.max_tokens)
        results: list[Generation] = []
        at_once = self.batch or max(len(encoded), 1)
        for start in range(0, len(encoded), at_once):
            group = encoded[start : start + at_once]
            answers = [self._answer(prompt, sampling, limits) for prompt in group]
            self._run_together(group, answers)
            results += [answer.result() for answer in answers]
        return results

    # --- below: one step at a time

    def encode(self, prompt: PromptLike, images: Images = None, *, special_tokens: bool = False) -> Prompt:
        """Give the ids and tiles of `prompt`; `special_tokens` as `Processor.encode` takes it."""
        if not isinstance(prompt, Prompt):
            return self.processor.encode(prompt, images, special_tokens=special_tokens, context=self.context)
        if as_list(images):
            raise ArrieroError("there are images beside an encoded prompt", remedy="Encode them with the prompt")
        return prompt

    def prefill(self, prompt: PromptLike, images: Images = None) -> State:
        """Read `prompt` into a new state whose `logits` choose the first token of the answer."""
        encoded = self.encode(prompt, images)
        self._room(encoded, None)
        cache = self.backend.new_cache(1, self.context)
        logits = self._read(encoded, cache)
        assert logits is not None
        return State(cache, logits)

    def decode(self, state: State, token: int) -> Floats:
        """Append `token` to `state` and give the logits f32 [V] for the one after it."""
        if int(state.cache.lengths[0]) >= self.context:
            raise ArrieroError(f"the context of {self.context} tokens is full", remedy="Start a shorter prompt")
        if (
            not isinstance(token, Integral)
            or not 0 <= token < self.spec.vocab_size
            or token == self.spec.image_token_id
        ):
            raise ArrieroError(f"token {token!r} cannot be decoded", expected="a known token, no image placeholder")
        state.logits = self._step(state.cache, [token])[0]
        return state.logits

    def logits(self, input_ids: Ints, pixel_values: Floats | None = None, captures: bool = False) -> StepOutput:
        """Run ids i64 [S] from the start and give the logits of every position [1, S, V].

        `captures` adds what each layer gave and where each token was routed. The ids are read in the same pieces as
        a prompt is.
        """
        prompt = Prompt(np.asarray(input_ids, np.int64), pixel_values)
        if prompt.input_ids.size > self.context:
            raise self._too_long(prompt.input_ids.size, 0)
        cache = self.backend.new_cache(1, prompt.input_ids.size)
        steps = [
            self.backend.forward(embeds, positions, cache, np.arange(embeds.shape[1]), captures)
            for embeds, positions in self._embedded(prompt)
        ]
        if not steps:
            raise ArrieroError("there are no ids to run", expected="at least one")
        first = steps[0]
        return StepOutput(
            logits=np.concatenate([step.logits for step in steps], axis=1),
            expert_ids={n: np.concatenate([step.expert_ids[n] for step in steps], axis=1) for n in first.expert_ids},
            hiddens={n: np.concatenate([step.hiddens[n] for step in steps], axis=1) for n in first.hiddens},
        )

    # --- inside

    def _answer(self, prompt: Prompt, sampling: Sampling, limits: Limits) -> Answer:
        room = self._room(prompt, limits.max_tokens)
        detokenizer = self.processor.detokenizer()
        return Answer(self.spec, detokenizer, sampling, limits, room, len(prompt.input_ids))

    def _room(self, prompt: Prompt, max_tokens: int | None) -> int:
        """How many tokens the answer may have; refuses what does not fit the context."""
        length = len(prompt.input_ids)
        if length == 0:
            raise ArrieroError("the prompt has no tokens", expected="at least one")
        if length + (max_tokens or 1) > self.context:
            raise self._too_long(length, max_tokens or 1)
        return max_tokens or self.context - length

    def _too_long(self, length: int, answer: int) -> ArrieroError:
        return ArrieroError(
            f"the prompt's {length} tokens and {answer} for the answer exceed the context",
            expected=f"at most {self.context} tokens together",
            remedy="Shorten the prompt, lower max_tokens, or build the bundle with a larger `context`",
        )

    def _pieces(self, prompt: Prompt, answer: Answer) -> Iterator[str]:
        cache = self.backend.new_cache(1, len(prompt.input_ids) + answer.max_tokens)
        logits = self._read(prompt, cache, answer)
        while logits is not None:
            if piece := answer.take(logits):
                yield piece
            if answer.finished:
                return
            logits = None if answer.cancelled else self._step(cache, answer.token_ids[-1:])[0]
        if piece := answer.cancel():
            yield piece

    def _run_together(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> None:
        capacity = max(len(p.input_ids) + a.max_tokens for p, a in zip(prompts, answers, strict=True))
        cache = self.backend.new_cache(len(prompts), capacity)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            logits = self._read(prompt, cache.rows(row, row + 1), answer)
            if logits is None:
                answer.cancel()
            else:
                answer.take(logits)
        running = list(answers)
        while True:
            for row in reversed(range(len(running))):
                if running[row].finished:
                    # the last row moves into the gap, so that finished rows cost no more steps
                    last = running.pop()
                    if row < len(running):
                        cache.copy_row(len(running), row)
                        running[row] = last
            if not running:
                return
            logits = self._step(cache.rows(0, len(running)), [answer.token_ids[-1] for answer in running])
            for row, answer in enumerate(running):
                answer.take(logits[row])
                if answer.cancelled and not answer.finished:
                    answer.cancel()

    def _read(self, prompt: Prompt, cache: Cache, answer: Answer | None = None) -> Floats | None:
        """Prefill one row; gives the last position's logits [V], or None when `answer` was cancelled meanwhile."""
        logits: Floats | None = None
        for embeds, positions in self._embedded(prompt):
            if answer is not None and answer.cancelled:
                return None
            last = np.array([embeds.shape[1] - 1])
            logits = self.backend.forward(embeds, positions, cache, last).logits[0, 0]
        return logits

    def _embedded(self, prompt: Prompt) -> Iterator[tuple[Floats, Ints]]:
        """Give a prompt as embeddings [1, piece, H] with positions [1, piece]; no piece crosses a chunk boundary."""
        ids, chunk = prompt.input_ids, self.spec.attention_chunk_size
        features = self._features(prompt)
        start = used = 0
        while start < len(ids):
            stop = min(start + PREFILL_PIECE, (start // chunk + 1) * chunk, len(ids))
            piece = ids[None, start:stop]
            placeholders = int(np.sum(piece == self.spec.image_token_id))
            embeds = self.backend.embed(piece, features[used : used + placeholders])
            yield embeds, np.arange(start, stop)[None]
            start, used = stop, used + placeholders

    def _features(self, prompt: Prompt) -> Floats:
        """Give the image features f32 [M, H] of a prompt, having checked its ids."""
        ids, vocabulary = prompt.input_ids, self.spec.vocab_size
        if ids.ndim != 1 or np.any((ids < 0) | (ids >= vocabulary)):
            raise ArrieroError("the ids are not a flat list of known tokens", expected=f"numbers below {vocabulary}")
        features = np.zeros((0, self.spec.hidden_size), np.float32)
        tiles, vision = prompt.pixel_values, self.spec.vision
        if tiles is not None and len(tiles):
            if vision is not None and tiles.shape[1:] != (3, vision.image_size, vision.image_size):
                raise ArrieroError(
                    f"pixel_values has the shape {list(tiles.shape)}",
                    expected=f"tiles [n, 3, {vision.image_size}, {vision.image_size}]",
                    remedy="Encode the images with the session's processor",
                )
            features = self.backend.vision(tiles.astype(np.float32, copy=False))
        placeholders = int(np.sum(ids == self.spec.image_token_id))
        if placeholders != len(features):
            raise ArrieroError(
                f"the ids hold {placeholders} image placeholders and the images make {len(features)} features",
                remedy="Encode text and images together with the session's processor",
            )
        return features

    def _step(self, cache: Cache, tokens: Sequence[int]) -> Floats:
        """Append one token to each row and give the logits [B, V] that follow."""
        ids = np.asarray(tokens, np.int64)[:, None]
        embeds = self.backend.embed(ids, np.zeros((0, self.spec.hidden_size), np.float32))
        return self.backend.forward(embeds, cache.lengths[:, None].copy(), cache, np.array([0])).logits[:, 0]
