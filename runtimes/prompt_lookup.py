"""Guesses how an answer goes on from where its prompt, or it itself, has said the like before.

Prompt lookup decoding (Saxena 2023): the last few tokens are looked for further back, and what followed there is the
draft. It pays where answers repeat what they were given: code that is changed, texts that are quoted, forms.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from arriero.runtimes.backend import Ints
from arriero.runtimes.draft_length import DraftLength

LEAST_SAME, MOST_SAME = 2, 4  # tokens that have to be the same, and that are looked at


class PromptLookup(DraftLength):
    """The tokens of one prompt and its answer, and how well drafts from them did of late."""

    def __init__(self, prompt_ids: Ints, most: int, never: int | None) -> None:
        """Draft at most `most` tokens at a time, and nothing from the token `never` on."""
        super().__init__(most)
        self._ids, self._count = prompt_ids.copy(), len(prompt_ids)
        self._answered, self._never = 0, never

    def draft(self, answer_ids: Sequence[int], room: int) -> list[int]:
        """At most `room` tokens that may follow the answer so far; none where nothing like its end was there before."""
        self._extend(answer_ids[self._answered :])
        self._answered = len(answer_ids)
        wanted = min(room, self.next())
        after = self._place_like_the_end() if wanted > 0 else None
        if after is None:
            return []
        drafted: list[int] = self._ids[after : min(after + wanted, self._count)].tolist()
        return drafted[: drafted.index(self._never)] if self._never in drafted else drafted

    def _place_like_the_end(self) -> int | None:
        """What follows the last place with as many of the last tokens as any has, where that is enough."""
        ids = self._ids[: self._count]
        found = np.flatnonzero(ids[:-1] == ids[-1])
        for same in range(1, MOST_SAME):
            longer = found[found >= same]
            if len(longer):
                longer = longer[ids[longer - same] == ids[-1 - same]]
            if not len(longer):
                if same < LEAST_SAME:
                    return None
                break
            found = longer
        return int(found[-1]) + 1

    def _extend(self, tokens: Sequence[int]) -> None:
        end = self._count + len(tokens)
        if end > len(self._ids):
            self._ids = np.concatenate([self._ids[: self._count], np.zeros(max(end, 256), np.int64)])
        self._ids[self._count : end] = tokens
        self._count = end
