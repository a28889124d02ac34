"""What the reference says to the end of an answer: the ids that are forced, and the answer that it generates itself.

S prompt and answer tokens, V vocabulary.
"""

from __future__ import annotations

import numpy as np

from arriero.runtimes.backend import Floats, Ints, ModelSpec
from arriero.runtimes.processor.processor import Prompt
from arriero.runtimes.proof.cases import MAX_ANSWER_TOKENS
from arriero.runtimes.session import Session


def forced_ids(fed: Ints, answer: Ints, last: Floats, spec: ModelSpec) -> Ints:
    """The `fed` ids [S] and, after an `answer`, the closing token that is likeliest by the `last` logits [V]."""
    if not len(answer) or not spec.eos_token_ids:
        return fed
    return np.append(fed, max(spec.eos_token_ids, key=lambda token: float(last[token])))


def generate_answer(session: Session, prompt: Prompt) -> tuple[list[int], str]:
    """Ids and text of the session's own answer, of at most `MAX_ANSWER_TOKENS` where the context has room for them."""
    room = session.context - len(prompt.input_ids)
    said = session.generate(prompt, max_tokens=max(1, min(MAX_ANSWER_TOKENS, room)))
    return list(map(int, said.token_ids)), said.text
