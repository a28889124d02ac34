"""One generated task: what is shown, what is asked, what is right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Part = str | np.ndarray


@dataclass(frozen=True)
class Turn:
    """A question and its one right answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Sample:
    """`shown` (text and uint8 images [h, w, 3], in order) comes before the first question; later turns ask on."""

    family: str
    shown: tuple[Part, ...]
    turns: tuple[Turn, ...]

    @property
    def answer(self) -> str:
        """The answer to the first question, the one that is scored."""
        return self.turns[0].answer

    @property
    def images(self) -> list[np.ndarray]:
        """The images shown, in order."""
        return [part for part in self.shown if isinstance(part, np.ndarray)]

    @property
    def prompt(self) -> str | list[dict[str, Any]]:
        """What is shown and the first question: one text, or one message where images are shown."""
        if not self.images:
            return "".join(map(str, self.shown)) + self.turns[0].question
        return self.conversation[:1]

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """All turns, questions and answers, as chat messages."""
        content: list[dict[str, str]] = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in self.shown
        ]
        messages: list[dict[str, Any]] = []
        for turn in self.turns:
            messages.append({"role": "user", "content": [*content, {"type": "text", "text": turn.question}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
            content = []
        return messages
