"""What the reference says to the end of an answer: the ids that are forced, and the answer that it generates itself.

S prompt and answer tokens, V vocabulary.
"""

from __future__ import annotations

import numpy as np

from arriero.runtimes.backend import Floats, Ints, ModelSpec
from arriero.runtimes.processor.processor import Prompt
from arriero.runtimes.proof.cases import answer_limit
from arriero.runtimes.session import Session


def forced_ids(fed: Ints, answer: Ints, last: Floats, spec: ModelSpec) -> Ints:
    """The `fed` ids [S] and, after an `answer`, the closing token that is likeliest by the `last` logits [V]."""
    if not len(answer) or not spec.eos_token_ids:
        return fed
    return np.append(fed, max(spec.eos_token_ids, key=lambda token: float(last[token])))


def generate_answer(session: Session, prompt: Prompt, expected: int) -> tuple[list[int], str]:
    """Ids and text of the session's own answer where one of `expected` tokens is right: see `answer_limit`.

    It is shorter where the context has no room for so many.
    """
    room = session.context - len(prompt.input_ids)
    said = session.generate(prompt, max_tokens=max(1, min(answer_limit(expected), room)))
    return list(map(int, said.token_ids)), said.text
