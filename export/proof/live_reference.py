"""The PyTorch reference itself as what candidates are measured against, case by case, with every array whole.

What `arriero parity --against` and `arriero compare` use. All figures are exact; torch and the checkpoint are needed.
S prompt and answer tokens, V vocabulary, M image placeholder tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from arriero.export.proof.reference_answer import forced_ids, generate_answer
from arriero.export.proof.write_record import SEED
from arriero.runtimes.backend import ModelSpec
from arriero.runtimes.proof.cases import ReferenceCase
from arriero.runtimes.proof.logits import WholeLogits
from arriero.runtimes.proof.parity import top_tokens
from arriero.runtimes.proof.parity_case import ParityCase
from arriero.runtimes.proof.record import label
from arriero.runtimes.proof.sketch import WholeArray, seeded_features
from arriero.runtimes.session import Session
from arriero.runtimes.steps import check_finite
from arriero.thresholds import AnswerMode


@dataclass(frozen=True)
class LiveReference:
    """A session over the PyTorch reference, and the cases that it is asked."""

    session: Session
    cases: Sequence[ParityCase]
    answers: AnswerMode = "generated"

    @property
    def spec(self) -> ModelSpec:
        """The model's facts."""
        return self.session.spec

    def __len__(self) -> int:
        return len(self.cases)

    def __iter__(self) -> Iterator[ReferenceCase]:
        for number, case in enumerate(self.cases):
            yield self.case(number, case)

    def case(self, number: int, case: ParityCase) -> ReferenceCase:
        """What the reference says of one case."""
        session, spec = self.session, self.session.spec
        prompt = session.encode(case.prompt, list(case.images))
        answer = session.processor.tokenize(case.answer)
        fed, pixels = np.concatenate([prompt.input_ids, answer]), prompt.pixel_values
        recorder: Any = session.backend
        with recorder.router_margins() as noted:
            output = session.logits(fed, pixels, captures=True)
        logits = check_finite(output.logits[0])
        placeholders = 0 if spec.image_token_id is None else int(np.sum(fed == spec.image_token_id))
        seed = SEED, label("seeded features", number)
        embeds = session.embed(fed[None], seeded_features(*seed, placeholders, spec.hidden_size))
        ids, text = ([], "") if self.answers == "forced" else generate_answer(session, prompt, len(answer))
        return ReferenceCase(
            case=case,
            prompt_tokens=len(prompt.input_ids),
            forced_ids=forced_ids(fed, answer, logits[-1], spec).astype(np.int64),
            top_tokens=top_tokens(logits, spec.image_token_id),
            logits=WholeLogits(logits),
            embeddings=WholeArray(embeds),
            feature_seed=seed,
            pixels=None if pixels is None else WholeArray(pixels),
            features=None if pixels is None else WholeArray(session.vision(pixels)),
            hiddens={layer: WholeArray(hidden) for layer, hidden in output.hiddens.items()},
            expert_ids={layer: chosen[0] for layer, chosen in output.expert_ids.items()},
            margins={layer: np.concatenate(pieces) for layer, pieces in noted.items()},
            generated_ids=ids,
            generated_text=text,
        )
