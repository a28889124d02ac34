"""One parity case, and what the reference says of it: where every measurement of a candidate reads from.

S tokens that are fed (prompt and answer), F forced ids (those, and the closing token after an answer), H hidden,
V vocabulary, k experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from numpy.typing import NDArray

from arriero.runtimes.backend import Ints, ModelSpec
from arriero.runtimes.proof.logits import LogitFigures, LogitMeter
from arriero.runtimes.proof.metrics import ErrorSums
from arriero.runtimes.proof.parity_case import ParityCase
from arriero.thresholds import AnswerMode

MAX_ANSWER_TOKENS = 64  # of a generated answer, where a short one is expected or none is known


def answer_limit(expected: int) -> int:
    """The most tokens that are generated where an answer of `expected` tokens is right: room for it, and for more."""
    return max(MAX_ANSWER_TOKENS, 2 * expected)


class ErrorMeter(Protocol):
    """Measures a candidate's array that comes in pieces, in order."""

    def add(self, piece: NDArray) -> None:
        """Go on with `piece`."""
        ...

    def errors(self) -> ErrorSums:
        """How far the array is off. Raises ShapesDiffer where the pieces are more or less than the reference has."""
        ...


class ReferenceArray(Protocol):
    """An array of the reference, whole or as a sketch."""

    def meter(self) -> ErrorMeter:
        """Measures a candidate's."""
        ...

    def errors(self, candidate: NDArray) -> ErrorSums:
        """How far the candidate's array is off. Raises ShapesDiffer."""
        ...


class ReferenceLogits(Protocol):
    """The reference's logits [S, V] of a case, whole or sampled."""

    def meter(self, near_tie: float) -> LogitMeter:
        """Measures a candidate's."""
        ...

    def figures(self, candidate: NDArray, near_tie: float) -> LogitFigures:
        """Every figure of the candidate's logits [S, V] against these. Raises ShapesDiffer."""
        ...


@dataclass(frozen=True)
class ReferenceCase:
    """What the reference says of one case. Of a case without pictures, `pixels` and `features` are None."""

    case: ParityCase
    prompt_tokens: int
    forced_ids: Ints  # [F] prompt, answer and, after an answer, the closing token
    top_tokens: Ints  # [S] the token that a greedy answer takes after each position
    logits: ReferenceLogits
    embeddings: ReferenceArray  # [1, S, H] with seeded features in the pictures' places
    feature_seed: tuple[int, str]  # of these features
    pixels: ReferenceArray | None
    features: ReferenceArray | None  # [M, H] of tower and projector
    hiddens: Mapping[int, ReferenceArray] = field(default_factory=dict)  # after each layer [1, S, H]
    expert_ids: Mapping[int, Ints] = field(default_factory=dict)  # of each MoE layer [S, k]
    margins: Mapping[int, NDArray] = field(default_factory=dict)  # k-th best minus next best router logit [S]
    generated_ids: Sequence[int] = ()
    generated_text: str = ""

    @property
    def fed_ids(self) -> Ints:
        """The ids [S] that go through the model: the closing token is only expected, not read."""
        return self.forced_ids[: len(self.top_tokens)]

    @property
    def expected_ids(self) -> Ints:
        """The answer's ids and the closing one, which the positions from the prompt's last on lead to."""
        return self.forced_ids[self.prompt_tokens :]


class Reference(Protocol):
    """What candidates are measured against: a record, or a checkpoint's own PyTorch model."""

    @property
    def spec(self) -> ModelSpec:
        """The model's facts."""
        ...

    @property
    def answers(self) -> AnswerMode:
        """How it answers."""
        ...

    def __len__(self) -> int:
        """How many cases there are."""
        ...

    def __iter__(self) -> Iterator[ReferenceCase]:
        """The cases in their order, each read or computed when it is asked for."""
        ...
