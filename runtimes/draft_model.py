"""A second, smaller model that drafts what the first is likely to choose: its likeliest tokens, one after another.

What it says is a guess alone: the first model checks it as it checks what `PromptLookup` finds. Its cache has a row for
each answer that it drafts; everything happens on the engine's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np

from arriero.runtimes.backend import Backend, Cache, Floats, ModelSpec
from arriero.runtimes.request import Request
from arriero.runtimes.steps import append_rows, least_piece, packs_rows, piece_end, read_piece
from arriero.traits import MOST_DRAFTED

SHORT = MOST_DRAFTED + 1  # tokens that an answer grows by in one step, and so those that a row is usually behind


@dataclass
class _Row:
    """What a cache row holds: the first `read` tokens of a request, and behind them what was `guessed` to follow."""

    request: Request
    read: int = 0
    guessed: list[int] = field(default_factory=list)


class DraftModel:
    """The draft's backend, and where it stands in each answer."""

    def __init__(self, backend: Backend, target: ModelSpec, rows: int, context: int) -> None:
        """Draft for at most `rows` requests of `context` tokens, which the model `target` answers."""
        self.backend, self.failures = backend, 0
        self._most, self._capacity = rows, min(context, backend.spec.max_position_embeddings)
        self._vocabulary = target.vocab_size
        images = (target.image_token_id, backend.spec.image_token_id)
        self._never = [token for token in images if token is not None]
        self._cache: Cache | None = None
        self._rows: list[_Row] = []

    def draft(self, requests: Sequence[Request], rooms: Sequence[int], piece: int) -> list[list[int]]:
        """For each of `requests` at most as many tokens as it has room for; none where the draft is still behind.

        A long prompt is read `piece` tokens at a time, those of one request at once. An error is counted and ends this
        draft; the next comes after a pause that grows with every error, and the answers go on without meanwhile.
        """
        counts = [self._count(request, room) for request, room in zip(requests, rooms, strict=True)]
        if not any(counts):
            return [[] for _ in requests]
        wanted = {id(request): count for request, count in zip(requests, counts, strict=True) if count}
        try:
            self._keep(requests, wanted)
            guessed = self._guess(wanted, piece)
        except Exception:
            self.failures += 1
            self.drop()
            for request in requests:
                assert request.drafts is not None
                request.drafts.learn(1, 0)
            return [[] for _ in requests]
        return [guessed.get(id(request), []) for request in requests]

    def drop(self) -> None:
        """Give the cache's memory back."""
        self._cache = None
        self._rows.clear()

    def close(self) -> None:
        """Free the backend; nothing is drafted afterwards."""
        self.drop()
        self.backend.close()

    def _count(self, request: Request, room: int) -> int:
        """The tokens to draft: so few that the row can be cut back to those that were right; see `Cache.truncate`."""
        assert request.drafts is not None
        count, length, chunk = request.drafts.next(), request.length + 1, self.backend.spec.attention_chunk_size
        if request.tokens.tiles:  # a picture's placeholders say nothing without its features
            return 0
        return max(min(count, room, chunk - length % chunk, self._capacity - length + 1), 0)

    # --- rows

    def _keep(self, requests: Sequence[Request], wanted: Mapping[int, int]) -> None:
        """Have a row of each request that wants a draft, and none of those that have ended."""
        running = {id(request) for request in requests}
        for number in reversed(range(len(self._rows))):
            if id(self._rows[number].request) not in running:
                self._remove(number)
        there = {id(row.request) for row in self._rows}
        if self._cache is None:
            self._cache = self.backend.new_cache(self._most, self._capacity)
        for request in requests:
            if id(request) in wanted and id(request) not in there:
                self._rows.append(_Row(request))

    def _remove(self, number: int) -> None:
        """End a row; the last one takes its place."""
        assert self._cache is not None
        last = self._rows.pop()
        if number < len(self._rows):
            self._cache.copy_row(len(self._rows), number)
            self._rows[number] = last
        self._cache.truncate(len(self._rows), 0)

    def _cut_back(self, number: int) -> None:
        """Leave in a row what was right of what was guessed."""
        assert self._cache is not None
        row = self._rows[number]
        for token, chosen in zip(row.guessed, row.request.tokens_from(row.read).tolist(), strict=False):
            if token != chosen:
                break
            row.read += 1
        row.guessed.clear()
        self._cache.truncate(number, row.read)

    # --- tokens

    def _guess(self, wanted: Mapping[int, int], piece: int) -> dict[int, list[int]]:
        """What follows each request's last token, by the request's `id`."""
        counts = {n: count for n, row in enumerate(self._rows) if (count := wanted.get(id(row.request)))}
        ahead = self._catch_up([*counts], piece)
        guessed = {number: [token] for number, token in ahead.items()}
        while going := {n: [tokens[-1]] for n, tokens in guessed.items() if len(tokens) < counts[n]}:
            for number, (token,) in going.items():
                self._rows[number].guessed.append(token)
            for number, token in self._append(going).items():
                guessed[number].append(token)
        return {id(self._rows[number].request): tokens for number, tokens in guessed.items()}

    def _catch_up(self, numbers: Sequence[int], piece: int) -> dict[int, int]:
        """Read what the rows lack; gives the likeliest token behind each that then has all, by its number."""
        few: dict[int, list[int]] = {}
        ahead: dict[int, int] = {}
        complete: set[int] = set()
        has_read = False
        for number in numbers:
            self._cut_back(number)
            row = self._rows[number]
            length, spec = row.request.length + 1, self.backend.spec
            end = piece_end(spec, row.read, length, max(piece, least_piece(self.backend)), self.backend.few_rows)
            ids = row.request.tokens_from(row.read)[: end - row.read]
            if len(ids) > SHORT and has_read:
                continue
            row.read = end
            if end == length:
                complete.add(number)
            if len(ids) <= SHORT:
                few[number] = ids.tolist()
                continue
            has_read = True
            assert self._cache is not None
            none, last = np.zeros((0, spec.hidden_size), np.float32), np.array([len(ids) - 1])
            output = read_piece(self.backend, ids, none, self._cache.rows(number, number + 1), last)
            ahead[number] = self._likeliest(output.logits[0, 0])
        ahead |= self._append(few)
        return {number: token for number, token in ahead.items() if number in complete}

    def _append(self, tokens: Mapping[int, Sequence[int]]) -> dict[int, int]:
        """Append `tokens` to the rows of these numbers, neighbours together; gives the likeliest behind each."""
        assert self._cache is not None
        together = packs_rows(self.backend) or all(len(row) == 1 for row in tokens.values())
        likeliest: dict[int, int] = {}
        for group in _neighbours(sorted(tokens)) if together else [[number] for number in tokens]:
            rows = self._cache.rows(group[0], group[-1] + 1)
            logits = append_rows(self.backend, [tokens[number] for number in group], rows)
            likeliest |= {number: self._likeliest(one[-1]) for number, one in zip(group, logits, strict=True)}
        return likeliest

    def _likeliest(self, logits: Floats) -> int:
        """The likeliest token that the target may choose by `logits` [V]."""
        logits[self._never] = -np.inf
        return int(np.argmax(logits[: self._vocabulary]))


def _neighbours(numbers: Sequence[int]) -> list[list[int]]:
    """Ascending `numbers` in runs without a gap."""
    offset: Callable[[tuple[int, int]], int] = lambda pair: pair[1] - pair[0]  # noqa: E731
    return [[number for _, number in run] for _, run in groupby(enumerate(numbers), offset)]
