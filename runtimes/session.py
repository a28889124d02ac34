"""A model ready to answer: one prompt, a batch of them, or a stream; or step by step, by `prefill` and `decode`.

Shapes: S prompt tokens, V vocabulary, B batch rows, H hidden, C attention chunk.
Threads and `asyncio` tasks may share one session: what all of them ask is answered together, on the one thread that
owns the backend, see `Engine`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from types import TracebackType
from typing import Literal, Self, Unpack, overload

import numpy as np

from arriero.errors import ArrieroError
from arriero.runtimes.backend import Backend, Cache, CapsMemory, Floats, Ints, StepOutput
from arriero.runtimes.chat_session import Chat, load_chat
from arriero.runtimes.check_prompt import check_prompt
from arriero.runtimes.engine import Engine
from arriero.runtimes.generation import Answer, Generation
from arriero.runtimes.processor.chat import ChatOptions, Message
from arriero.runtimes.processor.pictures import Images, as_list
from arriero.runtimes.processor.processor import Processor, Prompt
from arriero.runtimes.request import Request
from arriero.runtimes.scheduler import EngineLimits, Stats
from arriero.runtimes.settings import AnswerSettings, Settings, chat_options, read_settings
from arriero.runtimes.steps import (
    append_tokens,
    check_finite,
    logits_piece,
    piece_end,
    read_forced,
    read_piece,
    read_together,
)
from arriero.runtimes.stream import Stream

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
        limits: EngineLimits | None = None,
        identity: str = "",
        draft: Backend | None = None,
    ) -> None:
        """Serve sequences of at most `context` tokens (the model's own limit when None), `batch` of them at once.

        `adapters` are the names of the backend's adapters; what does not say which it wants is read with `adapter`, or
        by the model itself. `limits` are the engine's; None is those of `context` and `batch` alone. A saved
        conversation belongs to the bundle of that `identity`. `draft` is a smaller model of the same tokens, which
        drafts answers as far as `limits` let it; the session closes it too.
        """
        self.identity = identity
        self.processor = processor
        self.spec = backend.spec
        self.context = min(context or self.spec.max_position_embeddings, self.spec.max_position_embeddings)
        self.batch = batch
        self.engine = Engine(backend, limits or EngineLimits(batch or EngineLimits.rows, self.context), draft)
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
        set. `json_schema`, `regex`, `choice`, `grammar` or `calls` say what the answer must be.
        `logprobs` n also gives each token's log-probability and the n likeliest; `skip_special_tokens=False`
        leaves control tokens in the text. `adapter` names the adapter of the bundle to answer with, None for the model
        itself. With `stream`, gives the text in pieces as it comes. A prompt or a setting
        that cannot work is an `ArrieroError` before anything runs.
        """
        answer = self.stream(prompt, images, **settings)
        return answer if stream else answer.wait()

    def stream(self, prompt: PromptLike, images: Images = None, **settings: Unpack[Settings]) -> Stream:
        """Answer `prompt` as `generate` does, in pieces as they come, for `for` and for `async for`."""
        read = read_settings(settings)
        encoded = self.encode(prompt, images, **chat_options(settings))
        return self.submit(self.request(encoded, read, settings.get("adapter", self.adapter)))

    def generate_batch(self, prompts: Sequence[PromptLike], **settings: Unpack[Settings]) -> list[Generation]:
        """Answer several prompts together, at most `batch` at a time, each as `generate` would alone.

        Images come inside messages or encoded prompts. The settings are those of `generate`. What goes wrong with one
        of them is raised, and ends the others.
        """
        if isinstance(prompts, str | Prompt):
            raise ArrieroError("prompts is one prompt", expected="a list of them", remedy="Use `generate`")
        read, chat = read_settings(settings), chat_options(settings)
        adapter = settings.get("adapter", self.adapter)
        self._number(adapter)
        encoded = [self.encode(prompt, **chat) for prompt in prompts]
        answers = [self.submit(request) for request in [self.request(prompt, read, adapter) for prompt in encoded]]
        try:
            return [answer.wait() for answer in answers]
        except Exception:
            for answer in answers:
                answer.close()
            for answer in answers:  # each ends within a step; nothing of a failed batch runs on
                with suppress(Exception):
                    answer.wait()
            raise

    def stats(self) -> Stats:
        """What the session has read and generated since it was opened, and what runs and waits now.

        Its `experts` say how each layer's cache of experts did; no layers without a cap on memory.
        """
        if isinstance(self.backend, CapsMemory):
            return replace(self.engine.stats, experts=self.backend.statistics())
        return self.engine.stats

    # --- conversations

    def chat(self, messages: Sequence[Message] = (), **settings: Unpack[Settings]) -> Chat:
        """Begin a conversation that keeps its place: a turn reads its own tokens alone. `messages` open it, such as the
        system's; `settings` are those of every turn.
        """
        listed = isinstance(messages, Sequence) and not isinstance(messages, str | bytes)
        if not (listed and all(isinstance(message, Mapping) for message in messages)):
            remedy = "Say a text with `send`, once the conversation has begun"
            raise ArrieroError(f"messages is {messages!r:.60}", expected="a list of messages", remedy=remedy)
        return Chat(self, messages, settings)

    def load_chat(self, path: str | os.PathLike[str], **settings: Unpack[Settings]) -> Chat:
        """Go on with a conversation that `Chat.save` wrote, where it stood; `settings` over those that it had."""
        return load_chat(self, path, settings)

    # --- below: what those are made of

    def request(self, prompt: Prompt, settings: AnswerSettings, adapter: str | None) -> Request:
        """What the engine needs to know to answer an encoded prompt."""
        room = self._room(prompt, settings.limits.max_tokens)
        form = settings.form
        constraint = None if form.is_free else self.processor.grammars.constrain(form)
        answer = Answer(self.spec, self.processor.decode, settings, room, prompt.input_ids, constraint)
        return Request(prompt, answer, self._number(adapter), self.spec)

    def submit(self, request: Request, answered: Callable[[Generation], None] | None = None) -> Stream:
        """Have `request` answered; `answered` is called with the whole of it by who reads the stream to its end."""
        self.engine.submit(request)
        return Stream(self.engine, request, answered)

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

    def encode_turn(self, messages: Sequence[Message], images: Images = None, **chat: Unpack[ChatOptions]) -> Prompt:
        """Give the ids and tiles of what follows the words of the last answer in `messages`; see `encode`."""
        return self.processor.encode_turn(messages, images, context=self.context, **chat)

    def prefill(self, prompt: PromptLike, images: Images = None, adapter: str | None = None) -> State:
        """Read `prompt` into a new state whose `logits` choose the first token; `adapter` None is the session's own."""
        encoded = self.encode(prompt, images)
        self._room(encoded, None)
        cache = self._new_cache(1, self.context, adapter or self.adapter)
        return State(cache, self._read(encoded, cache))

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

        `captures` adds what each layer gave and where each token was routed.
        """
        steps, start, size = list[StepOutput](), 0, len(input_ids)
        for step in self.steps(input_ids, pixel_values, captures):
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

    def steps(
        self, input_ids: Ints, pixel_values: Floats | None = None, captures: bool = False
    ) -> Iterator[StepOutput]:
        """The same piece by piece, of few enough tokens that the logits of one are no burden."""
        return self._steps_of(Prompt(input_ids, pixel_values), captures, every=True)

    def together(self, prompts: Sequence[Prompt], captures: bool = False) -> list[StepOutput]:
        """The logits of every position of several prompts that are read in one step, each as `logits` gives it.

        The backend has to be one that `steps.shares_steps`, and each prompt to lie in one attention chunk.
        """
        fitting = [self._fitting(prompt) for prompt in prompts]
        rows, features = [prompt.input_ids for prompt in fitting], [self._features(prompt) for prompt in fitting]
        cache = self._new_cache(len(rows), max(map(len, rows)), self.adapter)
        pictures = np.concatenate(features)
        return self.engine.run(partial(read_together, rows=rows, features=pictures, cache=cache, captures=captures))

    def forced_logits(
        self, input_ids: Ints, pixel_values: Floats | None, expert_ids: Mapping[int, Ints]
    ) -> Iterator[Floats]:
        """The logits of every position, piece by piece [S, V], tokens sent to `expert_ids` [S, k] of each MoE layer.

        The backend has to be one that `steps.forces_routing`.
        """
        prompt = self._fitting(Prompt(input_ids, pixel_values))
        cache, start = self._new_cache(1, prompt.input_ids.size, self.adapter), 0
        for ids, features in self._pieces_of(prompt, self._most(every=True)):
            own = {layer: chosen[start : start + len(ids)] for layer, chosen in expert_ids.items()}
            yield self.engine.run(partial(read_forced, ids=ids, features=features, cache=cache, expert_ids=own))
            start += len(ids)

    def served_logits(self, input_ids: Ints, pixel_values: Floats | None, token: int | None) -> list[Floats]:
        """The logits f32 [V] after a prompt and, if there is one, after a `token`: as `prefill` and `decode` give them.

        The cache has room for so much alone.
        """
        prompt = self._fitting(Prompt(input_ids, pixel_values))
        cache = self._new_cache(1, prompt.input_ids.size + (token is not None), self.adapter)
        logits = [self._read(prompt, cache)]
        return logits if token is None else [*logits, self._step(cache, [token])[0]]

    def routes(self, prompt: Prompt) -> dict[int, Ints]:
        """The experts i64 [S, k] that each MoE layer routes the S tokens of `prompt` to, by the layer's number."""
        steps = [step.expert_ids for step in self._steps_of(prompt, True, every=False)]
        return {n: np.concatenate([step[n][0] for step in steps]) for n in steps[0]}

    def embed(self, input_ids: Ints, image_features: Floats) -> Floats:
        """Embed ids i64 [B, S], image placeholders taking `image_features` f32 [M, H] in order: f32 [B, S, H]."""
        return self.engine.run(lambda backend: backend.embed(input_ids, image_features))

    def vision(self, pixel_values: Floats) -> Floats:
        """Turn tiles f32 [n, 3, h, w] into features f32 [M, H]."""
        return self.engine.run(lambda backend: backend.vision(pixel_values))

    # --- inside

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

    def _read(self, prompt: Prompt, cache: Cache) -> Floats:
        """Prefill one row; gives the last position's logits [V]."""
        for step in self._read_into(cache, prompt, captures=False, every=False):
            logits = check_finite(step.logits[0, 0])
        return logits

    def _steps_of(self, prompt: Prompt, captures: bool, every: bool) -> Iterator[StepOutput]:
        """What each piece of a prompt gives, read from the start: logits of `every` position, or of its last."""
        prompt = self._fitting(prompt)
        cache = self._new_cache(1, prompt.input_ids.size, self.adapter)
        return self._read_into(cache, prompt, captures, every)

    def _fitting(self, prompt: Prompt) -> Prompt:
        """The prompt as `check_prompt` gives it. Raises `ArrieroError` for one that the context does not hold."""
        checked = check_prompt(prompt, self.spec)
        if checked.input_ids.size > self.context:
            raise self._too_long(checked.input_ids.size, 0)
        return checked

    def _read_into(self, cache: Cache, prompt: Prompt, captures: bool, every: bool) -> Iterator[StepOutput]:
        """The same, into the one row of `cache`."""
        for ids, features in self._pieces_of(prompt, self._most(every)):
            index = np.arange(0 if every else len(ids) - 1, len(ids))
            yield self.engine.run(
                partial(read_piece, ids=ids, features=features, cache=cache, logits_index=index, captures=captures)
            )

    def _most(self, every: bool) -> int:
        """Tokens of a piece, of which `every` one gets logits, or the last alone."""
        piece = self.backend.piece
        return min(piece, logits_piece(self.spec.vocab_size)) if every else piece

    def _pieces_of(self, prompt: Prompt, most: int) -> Iterator[tuple[Ints, Floats]]:
        """Give a prompt in pieces of about `most` tokens: ids [S] with their image features [M, H]; none crosses a
        chunk's edge.
        """
        ids, features = prompt.input_ids, self._features(prompt)
        start = used = 0
        while start < len(ids):
            stop = piece_end(self.spec, start, len(ids), most, self.backend.few_rows)
            piece = ids[start:stop]
            placeholders = int(np.sum(piece == self.spec.image_token_id))
            yield piece, features[used : used + placeholders]
            start, used = stop, used + placeholders

    def _features(self, prompt: Prompt) -> Floats:
        """The features [M, H] of a prompt's pictures, or none."""
        if prompt.pixel_values is None:
            return np.zeros((0, self.spec.hidden_size), np.float32)
        return self.vision(prompt.pixel_values)

    def _step(self, cache: Cache, tokens: Sequence[int]) -> Floats:
        """Append one token to each row and give the logits [B, V] that follow."""
        return check_finite(self.engine.run(partial(append_tokens, tokens=tokens, cache=cache)))
