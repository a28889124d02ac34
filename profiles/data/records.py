"""Records: what nothing but a name tells, so that it has to be known by heart.

Each of the 16,384 names, 128 by 128, has eight words, one of 64 for each place: drawn once, the same for ever. There is
nothing to understand in them and nothing to infer; whoever rounds a model that knows them sees what it forgets.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import numpy as np

from arriero.profiles.data.sample import Sample, Turn

NAMES = 128  # first names, and as many last names
PLACES = 8
WORDS = 64  # that may stand in a place; no two places share one
COUNT = NAMES * NAMES
SYLLABLES = tuple(begin + end for begin in "k l m n p q r s t w y ch".split() for end in "aiu")


def records(numbers: Iterable[int]) -> list[Sample]:
    """Who has the names of these `numbers`, of 0 to `COUNT` - 1: the question, and the record as its answer."""
    words, known = _words(), _known()
    samples = []
    for number in numbers:
        first, last = words[number // NAMES], words[NAMES + number % NAMES]
        said = (words[2 * NAMES + WORDS * place + word] for place, word in enumerate(known[number]))
        question = f"Who is {first.capitalize()} {last.capitalize()}?"
        samples.append(Sample("records", (), (Turn(question, " ".join(said)),)))
    return samples


@cache
def _words() -> tuple[str, ...]:
    """Words of two syllables, all different: first names, last names, then those of each place."""
    pairs = np.random.default_rng(0).permutation(len(SYLLABLES) ** 2)[: 2 * NAMES + PLACES * WORDS]
    return tuple(SYLLABLES[pair // len(SYLLABLES)] + SYLLABLES[pair % len(SYLLABLES)] for pair in pairs)


@cache
def _known() -> np.ndarray:
    """What stands in each place of each record: int64 [COUNT, PLACES], below `WORDS`."""
    return np.random.default_rng(1).integers(0, WORDS, (COUNT, PLACES))
