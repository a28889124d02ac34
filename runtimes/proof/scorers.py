"""Judges of answers by name: whether what was said is right. A record names its scorer, so that every machine scores
alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from arriero.errors import ArrieroError


def same_answer(right: str, said: str) -> bool:
    """Whether `said` is `right`, blind to case, spacing and a final full stop."""
    return _plain(said) == _plain(right)


# Name -> whether the second text is right where the first one is the expected answer.
SCORERS: dict[str, Callable[[str, str], bool]] = {"same_answer": same_answer}
SAME_ANSWER = "same_answer"  # the scorer of every case of our sample sets that has an answer


def score(scorer: str, right: str, said: str) -> bool:
    """Whether `said` is right by the named scorer. Raises ArrieroError for a name that there is none of."""
    if scorer not in SCORERS:
        raise ArrieroError(
            f"there is no scorer {scorer!r}",
            expected=f"one of {', '.join(SCORERS)}",
            remedy="Use the arriero that wrote the reference record, or write the record with this one",
        )
    return SCORERS[scorer](right, said)


def accuracy(right: Sequence[str], said: Sequence[str], scorer: str = SAME_ANSWER) -> float:
    """Share of right answers: task accuracy."""
    return sum(score(scorer, *pair) for pair in zip(right, said, strict=True)) / len(right)


def _plain(text: str) -> str:
    return " ".join(text.lower().strip().rstrip(".").split())
