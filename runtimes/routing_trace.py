"""Which experts tokens are routed to, as JSON lines, and how often a cache of the least recently used would hold them.

A line is a token in a MoE layer: {"prompt": 0, "token": 12, "answer": true, "layer": 3, "experts": [5]}; `token` counts
from the prompt's first, `answer` says that it was decoded alone.
Legend: S tokens, k experts per token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from arriero.errors import ArrieroError
from arriero.runtimes.backend import Ints
from arriero.runtimes.processor.pictures import Images
from arriero.runtimes.session import PromptLike, Session
from arriero.strict_json import parse_json


@dataclass(frozen=True)
class Routes:
    """Where the S tokens of a sequence go: i64 [S, k] of each layer, by its number; the first `read` are the prompt."""

    read: int
    experts: Mapping[int, Ints]

    def lines(self, prompt: int) -> Iterator[str]:
        """The sequence as the trace's lines, its number being `prompt`."""
        for token in range(len(next(iter(self.experts.values())))):
            for layer, ids in self.experts.items():
                line = {"prompt": prompt, "token": token, "answer": token >= self.read, "layer": layer}
                yield json.dumps({**line, "experts": ids[token].tolist()})


def trace_routes(session: Session, prompt: PromptLike, images: Images, max_tokens: int) -> Routes:
    """Where `session` routes the tokens of a prompt and of its greedy answer, but for the last, which nothing reads."""
    encoded = session.encode(prompt, images)
    room = min(max_tokens, session.context - len(encoded.input_ids))
    answer = session.generate(encoded, max_tokens=max(1, room)).token_ids[:-1]
    ids = np.concatenate([encoded.input_ids, np.array(answer, np.int64)])
    return Routes(len(encoded.input_ids), session.routes(replace(encoded, input_ids=ids)))


REMEDY = "Write one with `arriero trace`"


def read_trace(path: Path) -> list[Routes]:
    """The sequences of a trace. Raises `ArrieroError` with the line that is none of a trace."""
    if not path.is_file():
        raise ArrieroError("there is no such trace", where=str(path), remedy=REMEDY)
    chosen: dict[int, dict[int, list[list[int]]]] = {}
    read: dict[int, int] = {}
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            line = parse_json(text, f"{path}:{number}", REMEDY)
            try:
                prompt, layer, experts = int(line["prompt"]), int(line["layer"]), [int(one) for one in line["experts"]]
                token, answer = int(line["token"]), bool(line["answer"])
            except (KeyError, TypeError, ValueError):
                raise ArrieroError("this is no line of a trace", where=f"{path}:{number}", remedy=REMEDY) from None
            chosen.setdefault(prompt, {}).setdefault(layer, []).append(experts)
            read[prompt] = max(read.get(prompt, 0), 0 if answer else token + 1)
    if not chosen:
        raise ArrieroError("the trace is empty", where=str(path), remedy=REMEDY)
    return [
        Routes(read[prompt], {layer: np.array(rows, np.int64) for layer, rows in layers.items()})
        for prompt, layers in sorted(chosen.items())
    ]


def hit_rates(routes: Sequence[Routes], experts: int) -> dict[int, list[float]]:
    """Of each layer, the share of chosen experts that are in memory with 1, 2, .. `experts` slots.

    The sequences follow each other, as one session answers them. Tokens of answers count; with none, all tokens do.
    """
    answers = any(len(ids) > one.read for one in routes for ids in one.experts.values())
    layers = sorted({layer for one in routes for layer in one.experts})
    rates = {}
    for layer in layers:
        depths = np.zeros(experts + 1, np.int64)  # how many were found so deep; the last was never named before
        stack: list[int] = []
        for one in routes:
            ids = one.experts[layer]
            counted = np.arange(len(ids)) >= (one.read if answers else 0)
            for row, counts in zip(ids.tolist(), counted.tolist(), strict=True):
                for depth in _touch(stack, row):
                    depths[experts if depth is None else depth] += counts
        rates[layer] = (np.cumsum(depths[:-1]) / max(1, depths.sum())).tolist()
    return rates


def _touch(stack: list[int], named: Iterable[int]) -> list[int | None]:
    """Move what one token names to the front; give how deep each was before, None for new ones."""
    row = list(dict.fromkeys(named))
    depths = [stack.index(one) if one in stack else None for one in row]
    for one in row:
        if one in stack:
            stack.remove(one)
    stack[:0] = reversed(row)
    return depths
