"""Cases that a candidate reads together: as many in a step as memory allows, so that weights are read once for them.

S tokens that are fed for a case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from arriero.runtimes.backend import StepOutput
from arriero.runtimes.memory_cap import given_bytes
from arriero.runtimes.processor.processor import Prompt
from arriero.runtimes.steps import least_piece, logits_piece, shares_steps
from arriero.traits import PREFILL_PIECE

if TYPE_CHECKING:
    from arriero.runtimes.backend import ModelSpec
    from arriero.runtimes.proof.cases import ReferenceCase
    from arriero.runtimes.session import Session

SHARE = 4  # one part in so many of the memory goes to what a step gives, which is there twice or thrice
MOST = 2 << 30  # bytes of it at most
T = TypeVar("T")


def usual_tokens(spec: ModelSpec) -> int:
    """Tokens of a usual piece of a prompt that gives the logits of every position."""
    return min(PREFILL_PIECE, logits_piece(spec.vocab_size))


def tokens_together(spec: ModelSpec, weights: int, memory: int | None, available: int | None) -> int:
    """Tokens of all cases in a step at most: a usual piece of a prompt, or more where each step reads the drive.

    That is where the bytes of the `weights` are more than the `available` memory: steps may then take a good part of
    `memory`, what the measurement may use of it.
    """
    usual = usual_tokens(spec)
    if available is None or weights <= available:
        return usual
    room = min(MOST, (available if memory is None else memory) // SHARE)
    return max(usual, room // given_bytes(spec))


def share_steps(items: Iterable[T], tokens: Callable[[T], int], least: int, most: int) -> Iterator[list[T]]:
    """The items in order, those together that are read in one step: of at most `most` `tokens`.

    One of fewer than `least` tokens, or of more than `most`, is read alone.
    """
    held, count = list[T](), 0
    for item in items:
        size = tokens(item)
        alone = not least <= size <= most
        if held and (alone or count + size > most):
            yield held
            held, count = [], 0
        if alone:
            yield [item]
        else:
            held.append(item)
            count += size
    if held:
        yield held


@dataclass(frozen=True)
class Forced:
    """A case with its `prompt` as the candidate encodes it, and what the candidate gives for the tokens fed."""

    case: ReferenceCase
    prompt: Prompt
    steps: Iterable[StepOutput]


def forced_cases(
    candidate: Session, cases: Iterable[ReferenceCase], most: int | None, captures: bool
) -> Iterator[Forced]:
    """Every case, its tokens fed to the candidate; at most `most` in a step, None for a usual piece.

    The bits of a case are the same whatever it shares a step with.
    """
    spec = candidate.spec
    most = usual_tokens(spec) if most is None else most
    limit = min(most, spec.attention_chunk_size) if shares_steps(candidate.backend) else 0
    for held in share_steps(cases, lambda case: len(case.fed_ids), least_piece(candidate.backend), limit):
        yield from _forced(candidate, held, captures)


def _forced(candidate: Session, cases: list[ReferenceCase], captures: bool) -> Iterator[Forced]:
    prompts = [candidate.encode(case.case.prompt, list(case.case.images)) for case in cases]
    fed = [Prompt(case.fed_ids, prompt.pixel_values) for case, prompt in zip(cases, prompts, strict=True)]
    if len(cases) == 1:
        yield Forced(cases[0], prompts[0], candidate.steps(fed[0].input_ids, fed[0].pixel_values, captures))
        return
    outputs = candidate.together(fed, captures)
    for case, prompt in zip(cases, prompts, strict=True):
        yield Forced(case, prompt, [outputs.pop(0)])
