"""Text families: recall across chunks, arithmetic, sorting."""

from __future__ import annotations

import numpy as np

from arriero.profiles.data.sample import Sample, Turn
from arriero.profiles.data.words import ADJECTIVES, KEYS, NOUNS, VALUES, VERBS

EARLY = 16  # a held-out question asks about one of the first pairs, a chunk (128 tokens) or more away
FILLER_SHARE = 0.1


def recall(rng: np.random.Generator, train: bool) -> Sample:
    """Key-value notes among filler, then questions; held-out questions reach back beyond a chunk boundary."""
    pairs = int(np.exp(rng.uniform(np.log(2), np.log(len(KEYS) + 1)))) if train else int(rng.integers(62, len(KEYS)))
    keys = [str(key) for key in rng.permutation(KEYS)[:pairs]]
    values = {key: str(rng.choice(VALUES)) for key in keys}
    notes: list[str] = []
    for key in keys:
        notes.append(f" {key} {values[key]}")
        if rng.random() < FILLER_SHARE:
            notes.append(filler(rng))
    asked = [str(key) for key in rng.permutation(keys if train else keys[:EARLY])][:10]
    turns = tuple(Turn(f"What goes with {key}?", values[key]) for key in asked)
    return Sample("recall", (f"Notes:{','.join(notes)}.\n",), turns)


def filler(rng: np.random.Generator) -> str:
    """Words that answer nothing."""
    subject, other = rng.choice(NOUNS, 2, replace=False)
    return f" the {rng.choice(ADJECTIVES)} {subject} {rng.choice(VERBS)} the {other}"


def arithmetic(rng: np.random.Generator, train: bool) -> Sample:
    """Sums and differences of numbers below 100."""
    return Sample("arithmetic", (), tuple(sum_turn(rng) for _ in range(5)))


def sum_turn(rng: np.random.Generator) -> Turn:
    """One question of arithmetic."""
    a, b = (int(n) for n in rng.integers(0, 100, 2))
    if rng.random() < 0.5:
        return Turn(f"What is {a} + {b}?", str(a + b))
    return Turn(f"What is {max(a, b)} - {min(a, b)}?", str(abs(a - b)))


def sorting(rng: np.random.Generator, train: bool) -> Sample:
    """A row of digits put in order, rising or falling."""
    turns = []
    for _ in range(3):
        digits = [int(n) for n in rng.integers(0, 10, rng.integers(3, 8))]
        falling = bool(rng.random() < 0.5)
        order = "from high to low" if falling else "from low to high"
        answer = " ".join(str(n) for n in sorted(digits, reverse=falling))
        turns.append(Turn(f"Sort {' '.join(map(str, digits))} {order}.", answer))
    return Sample("sorting", (), tuple(turns))
