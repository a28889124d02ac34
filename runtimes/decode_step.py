"""A decode step of several requests: the last token of each and, behind it, those that are drafted to follow.

Shapes: B rows that decode, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from arriero.runtimes.backend import Backend, Cache, Floats
from arriero.runtimes.request import Request
from arriero.runtimes.steps import append_rows, packs_rows
from arriero.traits import MOST_DRAFTED

TOGETHER = MOST_DRAFTED + 1  # tokens of one step at most, where some of them are drafts
Outcome = Floats | BaseException


def draft_tokens(
    backend: Backend, requests: Sequence[Request], most: int, draft: Callable[[Sequence[int]], list[list[int]]]
) -> list[list[int]]:
    """For each of `requests` the tokens, at most `most`, that are guessed to follow its last one.

    `draft` guesses at most as many of each as it is told. None where the backend could not check them in the step that
    the others share.
    """
    if not most or (len(requests) > 1 and not packs_rows(backend)):
        return [[] for _ in requests]
    room = min(most, TOGETHER // len(requests) - 1)
    return draft([request.draft_room(room, backend.spec.attention_chunk_size) for request in requests])


def decode_rows(
    backend: Backend, requests: Sequence[Request], drafts: Sequence[Sequence[int]], cache: Cache
) -> list[Outcome]:
    """For each request the logits f32 [1 + drafted, V] after its last token and what is drafted, or why there are none.

    `cache` has a row of each. Without drafts, rows go together as many at a time as the backend gives them their bits.
    """
    count = len(requests)
    together = count if packs_rows(backend) or any(drafts) else backend.few_rows or count
    outcomes: list[Outcome] = []
    for first in range(0, count, together):
        some = slice(first, min(first + together, count))
        outcomes += _append(backend, requests[some], drafts[some], cache.rows(some.start, some.stop))
    return outcomes


def _append(
    backend: Backend, requests: Sequence[Request], drafts: Sequence[Sequence[int]], cache: Cache
) -> list[Outcome]:
    tokens = [[request.answer.token_ids[-1], *draft] for request, draft in zip(requests, drafts, strict=True)]
    try:
        return list(append_rows(backend, tokens, cache))
    except BaseException as error:
        if len(tokens) == 1 and not drafts[0]:
            return [error]
    # one of them may be to blame, or a draft: each by itself and without, from where it stood
    cache.lengths[:] = [request.length for request in requests]
    outcomes: list[Outcome] = []
    for row, (last, *_) in enumerate(tokens):
        try:
            outcomes += append_rows(backend, [[last]], cache.rows(row, row + 1))
        except BaseException as error:
            outcomes.append(error)
    return outcomes
