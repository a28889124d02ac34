"""The settings of an answer as keyword arguments, spelled out once: how its tokens are chosen, when it ends, what of it
is given.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from numbers import Integral
from typing import Any, cast

from arriero.errors import ArrieroError
from arriero.runtimes.forced_calls import ForcedCalls
from arriero.runtimes.grammar import Form
from arriero.runtimes.processor.chat import ChatOptions
from arriero.runtimes.sampling import Sampling, SamplingSettings


class Settings(SamplingSettings, ChatOptions, total=False):
    """What `Session.generate` and `generate_batch` take by name: `sampling`, or its fields one by one, and the rest.

    `max_tokens` None fills the context. An answer ends at a token of `stop_token_ids`, before a `stop` text, and soon
    after `cancel` is set. `logprobs` and `skip_special_tokens` are those of `Output`. `json_schema`,
    `regex`, `choice`, `grammar` and `calls` are those of `Form`. `adapter` names one of the bundle's adapters, None the
    model itself.
    """

    sampling: Sampling
    max_tokens: int | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    cancel: threading.Event | None
    logprobs: int | None
    skip_special_tokens: bool
    json_schema: Mapping[str, Any] | str | None
    regex: str | None
    choice: Sequence[str] | None
    grammar: str | None
    calls: ForcedCalls | None
    adapter: str | None


@dataclass(frozen=True)
class Limits:
    """When the caller wants an answer to end, beside the model's own closing tokens.

    After `max_tokens`, before a `stop` text (which may be that of a special token), with a token of `stop_token_ids`,
    or once `cancel` is set.
    """

    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    cancel: threading.Event | None = None

    def __post_init__(self) -> None:
        most = self.max_tokens
        if most is not None and not (_whole(most) and most >= 1):
            raise ArrieroError(f"max_tokens is {most!r}", expected="a whole number of at least 1")
        for text in self.stop:
            if not isinstance(text, str):
                raise ArrieroError(f"a stop text is {text!r}", expected="text")
            if not text:
                raise ArrieroError("a stop text is empty", expected="at least one character")
        for token in self.stop_token_ids:
            if not _whole(token) or token < 0:
                raise ArrieroError(f"stop_token_ids holds {token!r}", expected="ids of tokens, whole numbers")
        if self.cancel is not None and not callable(getattr(self.cancel, "is_set", None)):
            raise ArrieroError(f"cancel is {self.cancel!r}", expected="a `threading.Event`")


@dataclass(frozen=True)
class Output:
    """What of an answer is given.

    `logprobs` n: of each token its log-probability and the n likeliest tokens with theirs, under the model itself:
    before temperature, penalties, bias and whatever else changes the choice (as OpenAI's API has it); 0 for the chosen
    token's alone. `skip_special_tokens` False leaves control tokens in the text, the closing one included.
    """

    logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if self.logprobs is not None and not (_whole(self.logprobs) and self.logprobs >= 0):
            raise ArrieroError(f"logprobs is {self.logprobs!r}", expected="a whole number of at least 0")
        if not isinstance(self.skip_special_tokens, bool):
            raise ArrieroError(f"skip_special_tokens is {self.skip_special_tokens!r}", expected="True or False")


@dataclass(frozen=True)
class AnswerSettings:
    """All that a caller may say of an answer."""

    sampling: Sampling = field(default_factory=Sampling)
    limits: Limits = field(default_factory=Limits)
    output: Output = field(default_factory=Output)
    form: Form = field(default_factory=Form)

    def check_vocabulary(self, vocabulary: int) -> None:
        """Refuse token ids and counts that a model with `vocabulary` tokens does not know."""
        named = {
            "stop_token_ids": max(self.limits.stop_token_ids, default=0),
            "logit_bias": max(self.sampling.logit_bias or (), default=0),
        }
        for name, token in named.items():
            if token >= vocabulary:
                raise ArrieroError(f"{name} names the token {token}", expected=f"an id below {vocabulary}")
        if (self.output.logprobs or 0) > vocabulary:
            raise ArrieroError(f"logprobs is {self.output.logprobs}", expected=f"at most {vocabulary}")


def read_settings(settings: Settings) -> AnswerSettings:
    """Give the records that `settings` spell. Raises `ArrieroError` for an unknown, doubled or impossible one."""
    known = Settings.__annotations__
    for name in settings:
        if name not in known:
            nearest = get_close_matches(name, known, n=1, cutoff=0.4)
            remedy = f"Did you mean {nearest[0]}?" if nearest else "Leave it out"
            raise ArrieroError(f"there is no setting {name}", expected=f"one of {', '.join(known)}", remedy=remedy)
    values: dict[str, Any] = dict(settings)
    sampled = {name: value for name, value in values.items() if name in SamplingSettings.__annotations__}
    sampling = values.get("sampling")
    if "sampling" not in values:
        sampling = Sampling(**sampled)
    elif not isinstance(sampling, Sampling):
        raise ArrieroError(f"sampling is {sampling!r}", expected="a `Sampling`")
    elif sampled:
        raise ArrieroError(
            f"{', '.join(sampled)} and sampling both say how to choose a token",
            remedy=f"Leave sampling out, or put {', '.join(sampled)} into it",
        )
    for name in ("stop", "stop_token_ids"):
        if name in values:
            value = values[name]
            values[name] = (value,) if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
    return AnswerSettings(
        sampling, Limits(**_of(Limits, values)), Output(**_of(Output, values)), Form(**_of(Form, values))
    )


def chat_options(settings: Settings) -> ChatOptions:
    """Those of `settings` that a chat template takes."""
    return cast(ChatOptions, {name: value for name, value in settings.items() if name in ChatOptions.__annotations__})


def _of(record: type, values: dict[str, Any]) -> dict[str, Any]:
    """Those of `values` that are fields of `record`."""
    return {name: values[name] for name in record.__dataclass_fields__ if name in values}  # type: ignore[attr-defined]


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
