"""What an app is given, beside what is proven.

The forced pass reads prompt and answer at once and captures what every layer gives. An app's prompts and single tokens
go through other functions of a compiled bundle, which where answers are `forced` nothing else would look at. So the
first case is read as an app reads it too: its prompt, then one token of its answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from arriero.runtimes.proof.cases import ReferenceCase
from arriero.runtimes.proof.metrics import kl_per_token
from arriero.runtimes.steps import NotFinite

if TYPE_CHECKING:
    from arriero.runtimes.backend import Floats, StepOutput
    from arriero.runtimes.processor.processor import Prompt
    from arriero.runtimes.session import Session

SERVED_KL = "served_kl_highest"


def served_positions(case: ReferenceCase, context: int) -> tuple[int, ...]:
    """Where an app has logits from: the prompt's last token, and the answer's first where there is one and room."""
    last = case.prompt_tokens - 1
    return (last, last + 1) if last + 1 < min(len(case.fed_ids), context) else (last,)


def keep_rows(steps: Iterable[StepOutput], positions: Sequence[int], kept: list[Floats]) -> Iterator[StepOutput]:
    """The steps of a case as they are; of their logits [1, S, V] those at `positions` are added to `kept`."""
    start = 0
    for step in steps:
        size = step.logits.shape[1]
        kept += [step.logits[0, place - start].copy() for place in positions if start <= place < start + size]
        start += size
        yield step


def served_kl(candidate: Session, case: ReferenceCase, prompt: Prompt, proven: Sequence[Floats]) -> NDArray[np.float64]:
    """KL(proven || served) in nats of the logits that follow the case's prompt and, of two, the token after it.

    NaN where what is served is not finite.
    """
    token = int(case.fed_ids[case.prompt_tokens]) if len(proven) > 1 else None
    try:
        served = candidate.served_logits(case.fed_ids[: case.prompt_tokens], prompt.pixel_values, token)
    except NotFinite:
        return np.full(len(proven), np.nan)
    return kl_per_token(np.stack(proven), np.stack(served))
