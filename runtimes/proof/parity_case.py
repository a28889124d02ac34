"""One held-out prompt: what is asked and shown, and how its answer is judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from arriero.runtimes.proof.scorers import score


@dataclass(frozen=True)
class ParityCase:
    """One held-out prompt with its expected answer; `scorer` names what says whether an answer is right, "" nothing."""

    name: str
    family: str
    prompt: Any  # what Processor.encode takes: text or messages
    images: Sequence[Any] = ()
    answer: str = ""
    scorer: str = ""

    def is_right(self, said: str) -> bool | None:
        """Whether `said` is the right answer; None for a case without a scorer."""
        return score(self.scorer, self.answer, said) if self.scorer else None
