"""One held-out prompt: what is asked and shown, and how its answer is judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def map_pictures(prompt: Any, picture: Callable[[Any], str]) -> Any:
    """The `prompt` of a case with `picture(path)` in the place of every picture's or video's path in its messages."""

    def content(parts: Any) -> Any:
        if isinstance(parts, str):
            return parts
        return [{**part, "path": picture(part["path"])} if "path" in part else part for part in parts]

    if isinstance(prompt, str):
        return prompt
    return [{**message, "content": content(message["content"])} for message in prompt]
