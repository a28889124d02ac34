"""A model ready to answer: prefill in pieces, decode token by token, generate one answer or a batch of them.

Shapes: S prompt tokens, V vocabulary, B batch rows, H hidden, C attention chunk.
A session holds no state of its own: every call works on its own cache, so threads may share one session. The steps of
all of them run on the one thread that owns the backend, see `Engine`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from types import TracebackType
from typing import Literal, Self, Unpack, overload

import numpy as np

from arriero.errors import ArrieroError
from arriero.runtimes.backend import Backend, Cache, CacheStatistics, CapsMemory, Floats, Ints, StepOutput
from arriero.runtimes.check_prompt import check_prompt
from arriero.runtimes.engine import Engine
from arriero.runtimes.generation import Answer, Generation, Stream
from arriero.runtimes.processor.chat import ChatOptions, Message
from arriero.runtimes.processor.pictures import Images, as_list
from arriero.runtimes.processor.processor import Processor, Prompt
from arriero.runtimes.settings import AnswerSettings, Settings, chat_options, read_settings
from arriero.runtimes.steps import append_tokens, check_finite, read_piece
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
        self,
        backend: Backend,
        processor: Processor,
        context: int | None = None,
        batch: int | None = None,
        adapters: Sequence[str] = (),
        adapter: str | None = None,
    ) -> None:
        """Serve sequences of at most `context` tokens (the model's own limit when None), `batch` of them at once.

        `adapters` are the names of the backend's adapters; what does not say which it wants is read with `adapter`, or
        by the model itself.
        """
        self.engine = Engine(backend)
        self.processor = processor
        self.spec = backend.spec
        self.context = min(context or self.spec.max_position_embeddings, self.spec.max_position_embeddings)
        self.batch = batch
        self.piece = backend.piece if isinstance(backend, CapsMemory) else PREFILL_PIECE
        self.adapters = tuple(adapters)
        self.adapter = adapter
        self._number(adapter)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def backend(self) -> Backend:
        """What runs the graphs, on the engine's thread; `ArrieroError` once the session is closed."""
        return self.engine.backend

    def close(self) -> None:
        """Free the backend once the step in flight is done; answers still on their way end with an `ArrieroError`."""
        self.engine.close()

    def stats(self) -> CacheStatistics:
        """How each layer's cache of experts did since the bundle was loaded; no layers without a cap on memory."""

        def read(backend: Backend) -> CacheStatistics:
            return backend.statistics() if isinstance(backend, CapsMemory) else CacheStatistics()

        return self.engine.run(read)

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

        `tools` (JSON schemas of functions) and `documents` (mappings with title and text) go to the chat template; with
        `continue_final_message` the answer goes on with the last message instead of following it.
        How tokens are chosen is `sampling=Sampling(...)`, or its fields as keyword arguments: `temperature` 0, the
        default, is greedy; `seed` makes draws repeatable. The answer ends at the model's closing token or one of
        `stop_token_ids`, before a `stop` text, at `max_tokens` (None fills the context), or soon after `cancel` is
        set. `logprobs` n also gives each token's log-probability and the n likeliest; `skip_special_tokens=False`
        leaves control tokens in the text. `adapter` names the adapter of the bundle to answer with, None for the model
        itself. With `stream`, gives the text in pieces as it comes. A prompt or a setting
        that cannot work is an `ArrieroError` before anything runs.
        """
        read = read_settings(settings)
        encoded = self.encode(prompt, images, **chat_options(settings))
        answer = self._answer(encoded, read)
        adapter = settings.get("adapter", self.adapter)
        cache = self._new_cache(1, len(encoded.input_ids) + answer.max_tokens, adapter)
        pieces = Stream(self._pieces(encoded, answer, cache), answer)
        if stream:
            return pieces
        for _ in pieces:
            pass
        return pieces.result

    def generate_batch(self, prompts: Sequence[PromptLike], **settings: Unpack[Settings]) -> list[Generation]:
        """Answer several prompts together, at most `batch` at a time, each as `generate` would alone.

        Images come inside messages or encoded prompts. The settings are those of `generate`.
        """
        if isinstance(prompts, str | Prompt):
            raise ArrieroError("prompts is one prompt", expected="a list of them", remedy="Use `generate`")
        read, chat = read_settings(settings), chat_options(settings)
        adapter = settings.get("adapter", self.adapter)
        self._number(adapter)
        encoded = [self.encode(prompt, **chat) for prompt in prompts]
        for prompt in encoded:
            self._room(prompt, read.limits.max_tokens)
        results: list[Generation] = []
        at_once = self.batch or max(len(encoded), 1)
        for start in range(0, len(encoded), at_once):
            group = encoded[start : start + at_once]
            answers = [self._answer(prompt, read) for prompt in group]
            self._run_together(group, answers, adapter)
            results += [answer.result() for answer in answers]
        return results

    # --- below: one step at a time

    def encode(
        self, prompt: PromptLike, images: Images = None, *, special_tokens: bool = False, **chat: Unpack[ChatOptions]
    ) -> Prompt:
        """Give the ids and tiles of `prompt`.

        With `special_tokens`, control tokens that the prompt spells are what they say; `chat` is what else a chat
        template may show, as `generate` takes it. Raises `ArrieroError` for ones that the model cannot read.
        """
        if not isinstance(prompt, Prompt):
            prompt = self.processor.encode(prompt, images, special_tokens=special_tokens, context=self.context, **chat)
        elif beside := [*(["images"] if as_list(images) else []), *chat]:
            what = f"there are {' and '.join(beside)} beside an encoded prompt"
            raise ArrieroError(what, remedy="Encode them with the prompt")
        return check_prompt(prompt, self.spec)

    def prefill(self, prompt: PromptLike, images: Images = None, adapter: str | None = None) -> State:
        """Read `prompt` into a new state whose `logits` choose the first token; `adapter` None is the session's own."""
        encoded = self.encode(prompt, images)
        self._room(encoded, None)
        cache = self._new_cache(1, self.context, adapter or self.adapter)
        logits = self._read(encoded, cache)
        assert logits is not None
        return State(cache, logits)

    def decode(self, state: State, token: int) -> Floats:
        """Append `token` to `state` and give the logits f32 [V] for the one after it."""
        if int(state.cache.lengths[0]) >= self.context:
            raise ArrieroError(f"the context of {self.context} tokens is full", remedy="Start a shorter prompt")
        known = isinstance(token, Integral) and not isinstance(token, bool) and 0 <= token < self.spec.vocab_size
        if not known or token == self.spec.image_token_id:
            raise ArrieroError(f"token {token!r} cannot be decoded", expected="a known token, no image placeholder")
        state.logits = self._step(state.cache, [token])[0]
        return state.logits

    def logits(self, input_ids: Ints, pixel_values: Floats | None = None, captures: bool = False) -> StepOutput:
        """Run ids i64 [S] from the start and give the logits of every position [1, S, V], finite or not.

        `captures` adds what each layer gave and where each token was routed. The ids are read in the same pieces as
        a prompt is.
        """
        prompt = check_prompt(Prompt(input_ids, pixel_values), self.spec)
        steps: list[StepOutput] = []
        start, size = 0, prompt.input_ids.size
        for step in self._steps_of(prompt, captures, every=True):
            if not steps:  # put together here, not afterwards: of a large vocabulary they would be there twice
                logits = np.empty((1, size, step.logits.shape[-1]), np.float32)
            stop = start + step.logits.shape[1]
            logits[:, start:stop] = step.logits
            steps.append(replace(step, logits=logits[:, :0]))
            start = stop
        first = steps[0]
        return StepOutput(
            logits=logits,
            expert_ids={n: np.concatenate([step.expert_ids[n] for step in steps], axis=1) for n in first.expert_ids},
            hiddens={n: np.concatenate([step.hiddens[n] for step in steps], axis=1) for n in first.hiddens},
        )

    def routes(self, prompt: Prompt) -> dict[int, Ints]:
        """The experts i64 [S, k] that each MoE layer routes the S tokens of `prompt` to, by the layer's number."""
        steps = [step.expert_ids for step in self._steps_of(check_prompt(prompt, self.spec), True, every=False)]
        return {n: np.concatenate([step[n][0] for step in steps]) for n in steps[0]}

    def embed(self, input_ids: Ints, image_features: Floats) -> Floats:
        """Embed ids i64 [B, S], image placeholders taking `image_features` f32 [M, H] in order: f32 [B, S, H]."""
        return self.engine.run(lambda backend: backend.embed(input_ids, image_features))

    def vision(self, pixel_values: Floats) -> Floats:
        """Turn tiles f32 [n, 3, h, w] into features f32 [M, H]."""
        return self.engine.run(lambda backend: backend.vision(pixel_values))

    # --- inside

    def _answer(self, prompt: Prompt, settings: AnswerSettings) -> Answer:
        room = self._room(prompt, settings.limits.max_tokens)
        return Answer(self.spec, self.processor.decode, settings, room, prompt.input_ids)

    def _room(self, prompt: Prompt, max_tokens: int | None) -> int:
        """How many tokens the answer may have; refuses what does not fit the context."""
        length = len(prompt.input_ids)
        if length + (max_tokens or 1) > self.context:
            raise self._too_long(length, max_tokens or 1)
        return max_tokens or self.context - length

    def _new_cache(self, batch: int, capacity: int, adapter: str | None) -> Cache:
        number = self._number(adapter)
        cache = self.engine.run(lambda backend: backend.new_cache(batch, capacity))
        cache.adapters[:] = number
        return cache

    def _number(self, adapter: str | None) -> int:
        """The number that the backend knows an adapter by. Raises `ArrieroError` for one that it does not have."""
        if adapter is None:
            return 0
        if adapter not in self.adapters:
            expected = f"one of {', '.join(self.adapters)}" if self.adapters else "none: the bundle has no adapters"
            remedy = "Name one of them, or build the bundle with it under `runtime_adapters`"
            raise ArrieroError(f"there is no adapter {adapter!r}", expected=expected, remedy=remedy)
        return self.adapters.index(adapter) + 1

    def _too_long(self, length: int, answer: int) -> ArrieroError:
        return ArrieroError(
            f"the prompt's {length} tokens and {answer} for the answer exceed the context",
            expected=f"at most {self.context} tokens together",
            remedy="Shorten the prompt, lower max_tokens, or build the bundle with a larger `context`",
        )

    def _pieces(self, prompt: Prompt, answer: Answer, cache: Cache) -> Iterator[str]:
        logits = self._read(prompt, cache, answer)
        while logits is not None:
            if piece := answer.take(logits):
                yield piece
            if answer.finished:
                return
            logits = None if answer.cancelled else self._step(cache, answer.token_ids[-1:])[0]
        if piece := answer.cancel():
            yield piece

    def _run_together(self, prompts: Sequence[Prompt], answers: Sequence[Answer], adapter: str | None) -> None:
        capacity = max(len(p.input_ids) + a.max_tokens for p, a in zip(prompts, answers, strict=True))
        cache = self._new_cache(len(prompts), capacity, adapter)
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
                        self._copy_row(cache, len(running), row)
                        running[row] = last
            if not running:
                return
            logits = self._step(cache.rows(0, len(running)), [answer.token_ids[-1] for answer in running])
            for row, answer in enumerate(running):
                answer.take(logits[row])
                if answer.cancelled and not answer.finished:
                    answer.cancel()

    def _copy_row(self, cache: Cache, source: int, target: int) -> None:
        self.engine.run(lambda _: cache.copy_row(source, target))

    def _read(self, prompt: Prompt, cache: Cache, answer: Answer | None = None) -> Floats | None:
        """Prefill one row; gives the last position's logits [V], or None when `answer` was cancelled meanwhile."""
        logits: Floats | None = None
        for ids, features in self._pieces_of(prompt):
            if answer is not None and answer.cancelled:
                return None
            last = np.array([len(ids) - 1])
            piece = partial(read_piece, ids=ids, features=features, cache=cache, logits_index=last)
            logits = check_finite(self.engine.run(piece).logits[0, 0])
        return logits

    def _steps_of(self, prompt: Prompt, captures: bool, every: bool) -> Iterator[StepOutput]:
        """What each piece of a prompt gives, read from the start: logits of `every` position, or of its last."""
        if prompt.input_ids.size > self.context:
            raise self._too_long(prompt.input_ids.size, 0)
        cache = self._new_cache(1, prompt.input_ids.size, self.adapter)
        for ids, features in self._pieces_of(prompt):
            index = np.arange(0 if every else len(ids) - 1, len(ids))
            yield self.engine.run(
                partial(read_piece, ids=ids, features=features, cache=cache, logits_index=index, captures=captures)
            )

    def _pieces_of(self, prompt: Prompt) -> Iterator[tuple[Ints, Floats]]:
        """Give a prompt piece by piece: ids [S] with their image features [M, H]; none crosses a chunk boundary."""
        ids, chunk = prompt.input_ids, self.spec.attention_chunk_size
        features = np.zeros((0, self.spec.hidden_size), np.float32)
        if prompt.pixel_values is not None:
            features = self.vision(prompt.pixel_values)
        start = used = 0
        while start < len(ids):
            stop = min(start + self.piece, (start // chunk + 1) * chunk, len(ids))
            piece = ids[start:stop]
            placeholders = int(np.sum(piece == self.spec.image_token_id))
            yield piece, features[used : used + placeholders]
            start, used = stop, used + placeholders

    def _step(self, cache: Cache, tokens: Sequence[int]) -> Floats:
        """Append one token to each row and give the logits [B, V] that follow."""
        return check_finite(self.engine.run(partial(append_tokens, tokens=tokens, cache=cache)))
