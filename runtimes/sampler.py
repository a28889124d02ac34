"""Chooses one answer's tokens: the logits are changed by bias, penalties and the caller's function, then drawn from."""

from __future__ import annotations

import math

import numpy as np

from arriero.errors import ArrieroError
from arriero.runtimes.backend import Floats, Ints
from arriero.runtimes.draw import draw_token
from arriero.runtimes.grammar import Constraint
from arriero.runtimes.sampling import Sampling


class Sampler:
    """How one answer to one prompt is continued, token by token; V vocabulary."""

    def __init__(
        self, sampling: Sampling, prompt_ids: Ints, never: int | None, constraint: Constraint | None = None
    ) -> None:
        """Follow `sampling` after the ids i64 [S] of the prompt; the token `never` is not chosen, whatever it says.

        Nor is one that `constraint` forbids.
        """
        self._sampling, self._never, self._constraint = sampling, never, constraint
        self._random = sampling.generator()
        self._prompt_ids = prompt_ids
        self._tokens: list[int] = []
        bias = sampling.logit_bias or {}
        self._bias_ids = np.array(list(bias), np.int64)
        with np.errstate(over="ignore"):
            self._bias = np.array(list(bias.values()), np.float64).astype(np.float32)
        self._seen = np.unique(prompt_ids)  # what the repetition penalty is for
        self._ids, self._counts = np.zeros(0, np.int64), np.zeros(0, np.float32)  # of the answer so far

    def choose(self, logits: Floats) -> int:
        """Choose the token to follow from the model's `logits` [V]. Raises `ArrieroError` where all are banned."""
        sampling = self._sampling
        if sampling.adjusts or self._never is not None or self._constraint is not None:
            logits = self._adjusted(logits.copy())
        token = draw_token(
            logits, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, self._random.random
        )
        if sampling.adjusts:
            self._note(token)
        if self._constraint is not None:
            self._constraint.take(token)
        return token

    def _adjusted(self, logits: Floats) -> Floats:
        sampling = self._sampling
        logits[self._bias_ids] += self._bias
        if sampling.repetition_penalty != 1:
            seen = logits[self._seen]
            penalty = np.float32(sampling.repetition_penalty)
            with np.errstate(all="ignore"):  # what a tiny or a huge penalty makes infinite is refused below
                logits[self._seen] = np.where(seen > 0, seen / penalty, seen * penalty)
        if len(self._ids):
            logits[self._ids] -= self._counts * sampling.frequency_penalty + sampling.presence_penalty
        if sampling.logits_processor is not None:
            logits = self._processed(logits)
        if self._never is not None:
            logits[self._never] = -math.inf
        if self._constraint is not None:
            logits[self._constraint.forbidden()] = -math.inf
        largest = float(logits.max())
        if largest == -math.inf:
            raise ArrieroError("no token may follow: every one is banned", remedy="Ban fewer by logit_bias")
        if not largest < math.inf:
            raise ArrieroError(
                f"the logits to choose by are not finite (the largest is {largest})",
                expected="finite numbers, or minus infinity for a banned token",
                remedy="Look at what logits_processor and logit_bias add up to",
            )
        return logits

    def _processed(self, logits: Floats) -> Floats:
        """What the caller's function makes of `logits`."""
        assert self._sampling.logits_processor is not None
        given = self._sampling.logits_processor(np.append(self._prompt_ids, np.array(self._tokens, np.int64)), logits)
        processed: Floats = np.array(given, np.float32)
        if processed.shape != logits.shape:
            raise ArrieroError(
                f"logits_processor gives an array of shape {list(processed.shape)}",
                expected=f"the logits [{len(logits)}] to choose by",
            )
        return processed

    def _note(self, token: int) -> None:
        self._tokens.append(token)
        place = np.flatnonzero(self._ids == token)
        if len(place):
            self._counts[place] += 1
            return
        self._ids, self._counts = np.append(self._ids, token), np.append(self._counts, np.float32(1))
        if not np.any(self._seen == token):
            self._seen = np.append(self._seen, token)
