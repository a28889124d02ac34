"""Text families: recall across chunks, arithmetic, sorting."""

from __future__ import annotations

import numpy as np

from arriero.profiles.data.sample import Sample, Turn
from arriero.profiles.data.words import ADJECTIVES, KEYS, NOUNS, VALUES, VERBS

OPERANDS = 50
NOTES = (2, 13)  # fewest, and one more than most
FAR = (20, 27)  # filler sentences, of about seven tokens each, that put a chunk of 128 tokens between note and question
NEAR = (0, 4)
NEAR_SHARE = 0.4  # in training


def recall(rng: np.random.Generator, train: bool) -> Sample:
    """Key-value notes, filler, then questions; a held-out question reaches back beyond a chunk boundary."""
    keys = [str(key) for key in rng.permutation(KEYS)[: rng.integers(*NOTES)]]
    notes = [f"{key} {rng.choice(VALUES)}" for key in keys]
    words = [filler(rng) for _ in range(rng.integers(*(NEAR if train and rng.random() < NEAR_SHARE else FAR)))]
    asked = rng.permutation(len(keys))[:4]
    turns = [Turn(f"Notes on {keys[n]}?", notes[n]) for n in asked]
    if train:
        turns.insert(1, Turn("Repeat the notes.", "\n".join(notes)))
    return Sample("recall", ("Notes:\n" + "\n".join([*notes, *words]) + "\n",), tuple(turns))


def filler(rng: np.random.Generator) -> str:
    """Words that answer nothing."""
    subject, other = rng.choice(NOUNS, 2, replace=False)
    return f"the {rng.choice(ADJECTIVES)} {subject} {rng.choice(VERBS)} the {other}"


def arithmetic(rng: np.random.Generator, train: bool) -> Sample:
    """Sums and differences of numbers below 50."""
    return Sample("arithmetic", (), tuple(sum_turn(rng) for _ in range(5)))


def sum_turn(rng: np.random.Generator) -> Turn:
    """One question of arithmetic."""
    a, b = (int(n) for n in rng.integers(0, OPERANDS, 2))
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
