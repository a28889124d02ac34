"""/v1/completions: a text, or tokens, to go on with as they stand, without a chat template."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np

from arriero.runtimes.generation import Generation, TokenLogprobs
from arriero.runtimes.processor.processor import Prompt
from arriero.runtimes.server.answer_fields import AnswerFields, read_answer_fields
from arriero.runtimes.server.answers import Answers
from arriero.runtimes.server.entry_limit import EntryLimit
from arriero.runtimes.server.fields import Fields
from arriero.runtimes.server.form_fields import read_form
from arriero.runtimes.server.models import Model, Models
from arriero.runtimes.server.options import ServerOptions
from arriero.runtimes.server.sse import events
from arriero.runtimes.settings import Settings

DEFAULT_TOKENS, MOST_LOGPROBS = 16, 5  # as OpenAI's API has them


class Completion:
    """One request: read from its body, then answered."""

    operation = "text_completion"  # as OpenTelemetry's conventions have it
    pictures = None  # there is nowhere to show any

    def __init__(self, body: Any, models: Models, options: ServerOptions) -> None:
        """Read the body. Raises RefusalError for what cannot be answered."""
        fields = Fields(body)
        self.asked: AnswerFields = read_answer_fields(fields, models, options, DEFAULT_TOKENS)
        self._prompts = _read_prompts(fields, options.most_answers, self.model.bundle.context)
        self.shown: Settings = {"logprobs": fields.integer("logprobs", least=0, most=MOST_LOGPROBS)}
        self.shown |= read_form(fields)  # type: ignore[typeddict-item]
        for name, least in (("echo", False), ("suffix", ""), ("best_of", self.asked.count)):
            if fields.take(name, least) != least:
                raise fields.refusal(name, "is not possible here")
        fields.refuse_others()
        self.id, self.created = f"cmpl-{uuid.uuid4().hex}", int(time.time())

    @property
    def model(self) -> Model:
        """What answers."""
        return self.asked.model

    @property
    def count(self) -> int:
        """How many answers are asked for."""
        return self.asked.count * len(self._prompts)

    def encode(self) -> list[Prompt]:
        """The ids of each prompt; a text begins as every text does."""
        session = self.model.session
        bos = [] if session.spec.bos_token_id is None else [session.spec.bos_token_id]
        prompts = []
        for said in self._prompts:
            if isinstance(said, str):
                ids = [*bos, *session.processor.tokenize(said, context=session.context).tolist()]
            else:
                ids = said
            prompts.append(session.encode(Prompt(np.asarray(ids))))
        return prompts

    def whole(self, answers: Answers, results: list[Generation]) -> dict[str, Any]:
        """The answers in one piece."""
        choices = [
            self._choice(number, result.text, result.finish_reason, result.logprobs or ())
            for number, result in enumerate(results)
        ]
        return {**self._head(), "choices": choices, "usage": answers.usage()}

    def lines(self, answers: Answers) -> AsyncIterator[str]:
        """The answers as events."""
        return events(self._chunks(answers))

    async def _chunks(self, answers: Answers) -> AsyncIterator[dict[str, Any]]:
        """The answers as they come."""
        usage: dict[str, Any] = {"usage": None} if self.asked.include_usage else {}
        async for number, delta in answers.deltas():
            if delta is None:
                choice = self._choice(number, "", answers.streams[number].result.finish_reason, ())
            elif delta.text or delta.logprobs:
                choice = self._choice(number, delta.text, None, delta.logprobs)
            else:
                continue
            yield {**self._head(), "choices": [choice], **usage}
        if self.asked.include_usage:
            yield {**self._head(), "choices": [], "usage": answers.usage()}

    def _head(self) -> dict[str, Any]:
        head = {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model.name}
        return {**head, "system_fingerprint": self.model.fingerprint}

    def _choice(self, number: int, text: str, reason: str | None, entries: tuple[TokenLogprobs, ...]) -> dict[str, Any]:
        said = [entry for entry in entries if entry.in_text]
        logprobs = None if self.shown["logprobs"] is None or not said else self._logprobs(said)
        return {"index": number, "text": text, "finish_reason": reason, "logprobs": logprobs}

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        decode = self.model.session.processor.decode
        tokens = [decode([entry.token_id], False) for entry in entries]
        return {
            "tokens": tokens,
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [{decode([token], False): value for token, value in entry.top} for entry in entries],
            "text_offset": [len("".join(tokens[:number])) for number in range(len(tokens))],
        }


def _read_prompts(fields: Fields, most: int, context: int) -> list[str | list[int]]:
    said: Any = fields.take("prompt")
    for one in [said, *said[: most + 1]] if isinstance(said, list) else ():
        if isinstance(one, list):
            EntryLimit(context).take(one, "prompt")
    if isinstance(said, str) or (isinstance(said, list) and said and all(map(_is_token, said))):
        said = [said]
    good = (
        isinstance(said, list)
        and 1 <= len(said) <= most
        and all(isinstance(one, str) or (isinstance(one, list) and all(map(_is_token, one))) for one in said)
    )
    if not good or not all(said):
        raise fields.refusal("prompt", f"cannot be read; expected a text, a list of tokens, or up to {most} of them")
    prompts: list[str | list[int]] = said
    return prompts


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
