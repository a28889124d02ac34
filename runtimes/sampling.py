"""How an answer's tokens are chosen: what a caller may ask for, each with the meaning that others give the name.

`temperature`, `top_k`, `top_p`, `min_p` and `repetition_penalty` mean what they do in Hugging Face's `generate`, in its
order; `presence_penalty`, `frequency_penalty` and `logit_bias` what they do in OpenAI's API.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypedDict

import numpy as np

from arriero.errors import ArrieroError
from arriero.runtimes.backend import Floats, Ints

# Gives the logits f32 [V] to choose by, from the ids i64 [S] of prompt and answer so far, and the logits f32 [V].
LogitsProcessor = Callable[[Ints, Floats], Floats]

_ALL = "Leave it out to draw from every token"
_OFF = "Leave it out for none"


class SamplingSettings(TypedDict, total=False):
    """The fields of `Sampling` as keyword arguments, for who would rather not make one."""

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    logits_processor: LogitsProcessor | None
    seed: int | None


@dataclass(frozen=True)
class Sampling:
    """How to choose a token: first what changes its logit, in this order, then what it is drawn from.

    - `logit_bias`: added to the logits of the tokens it names; minus infinity bans one.
    - `repetition_penalty`: the logit of every token of prompt and answer so far is divided by it where it is positive
      and multiplied where it is negative; above 1 it discourages, 1 changes nothing.
    - `presence_penalty`, `frequency_penalty`: subtracted from the logit of every token of the answer so far (not of the
      prompt), the one once, the other as often as the token came; from -2 to 2.
    - `logits_processor`: a function of the ids i64 [S] of prompt and answer so far and of the logits f32 [V], a copy
      that it may change, which gives the logits to use.
    - `temperature` divides the logits; 0 takes the likeliest, ties going to the lowest id.
    - `top_k` keeps the k likeliest, `top_p` of these the fewest likeliest whose probability reaches it, `min_p` of
      these the ones at least so probable as this share of the likeliest.
    - The same `seed` draws the same tokens again.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    logits_processor: LogitsProcessor | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, kind, optional in _KINDS:
            value = getattr(self, name)
            if not (value is None and optional) and not _is(value, kind):
                raise ArrieroError(
                    f"{name} is {value!r}", expected="a whole number" if kind is Integral else "a number"
                )
        if not self.temperature >= 0 or self.temperature == math.inf:
            raise ArrieroError(
                f"temperature is {self.temperature}", expected="a number of at least 0", remedy="0 is greedy"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ArrieroError(f"top_k is {self.top_k}", expected="at least 1", remedy=_ALL)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ArrieroError(f"top_p is {self.top_p}", expected="above 0 and at most 1", remedy=_ALL)
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ArrieroError(f"min_p is {self.min_p}", expected="a share from 0 to 1", remedy=_ALL)
        if not 0 < self.repetition_penalty < math.inf:
            raise ArrieroError(
                f"repetition_penalty is {self.repetition_penalty}", expected="a number above 0", remedy="1 is none"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ArrieroError(f"{name} is {getattr(self, name)}", expected="from -2 to 2", remedy=_OFF)
        if self.seed is not None and self.seed < 0:
            raise ArrieroError(f"seed is {self.seed}", expected="at least 0", remedy="Leave it out for other draws")
        if self.logits_processor is not None and not callable(self.logits_processor):
            raise ArrieroError(
                f"logits_processor is {self.logits_processor!r}", expected="a function of ids and logits", remedy=_OFF
            )
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _read_bias(self.logit_bias))

    @property
    def adjusts(self) -> bool:
        """Whether anything changes the logits before a token is chosen."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)
        return penalties or bool(self.logit_bias) or self.logits_processor is not None

    def generator(self) -> np.random.Generator:
        """Give a fresh stream of random numbers for one answer."""
        return np.random.default_rng(self.seed)


_KINDS = (
    ("temperature", Real, False),
    ("top_k", Integral, True),
    ("top_p", Real, True),
    ("min_p", Real, True),
    ("repetition_penalty", Real, False),
    ("presence_penalty", Real, False),
    ("frequency_penalty", Real, False),
    ("seed", Integral, True),
)


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _read_bias(bias: Any) -> dict[int, float]:
    """A copy of `bias`, whose entries are sound but for the vocabulary's size."""
    if not isinstance(bias, Mapping):
        raise ArrieroError(f"logit_bias is {bias!r:.60}", expected="a mapping of token ids to numbers", remedy=_OFF)
    for token, value in bias.items():
        if not _is(token, Integral) or token < 0:
            raise ArrieroError(f"logit_bias names the token {token!r}", expected="a token's id, a whole number")
        if not _is(value, Real) or not value < math.inf:
            raise ArrieroError(
                f"logit_bias of token {token} is {value!r}", expected="a number, or minus infinity to ban the token"
            )
    return {int(token): float(value) for token, value in bias.items()}
