"""The two steps of a sequence, each one call on the backend's own thread, and what may come out of them.

What a backend can besides is asked by its attribute: `isinstance` of a protocol takes longer than a token may wait.
Shapes: B batch rows, S new tokens of a row, H hidden, V vocabulary, M image placeholder tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from arriero.errors import ArrieroError
from arriero.runtimes.backend import (
    Backend,
    Between,
    Cache,
    Floats,
    ForcesRouting,
    Ints,
    ModelSpec,
    PacksRows,
    Preemptible,
    StepOutput,
)

LOGITS = 128 << 20  # bytes of logits at a time
LEAST = 16  # tokens whose logits are there at a time, however large the vocabulary


class NotFinite(ArrieroError):
    """The model computed NaN or infinity, from which no token can be chosen."""


def piece_end(spec: ModelSpec, start: int, count: int, most: int, few: int = 0) -> int:
    """Where a piece from `start` of a prompt of `count` tokens ends: after `most` of them, or at the chunk's edge.

    A rest of at most `few` tokens goes with the piece before it: see `Backend.few_rows`.
    """
    edge = min((start // spec.attention_chunk_size + 1) * spec.attention_chunk_size, count)
    return edge if edge - start <= most + few else start + most


def logits_piece(vocabulary: int) -> int:
    """Tokens of a piece at most where the logits of every position are wanted."""
    return max(LEAST, LOGITS // (4 * vocabulary))


def read_piece(
    backend: Backend, ids: Ints, features: Floats, cache: Cache, logits_index: Ints, captures: bool = False
) -> StepOutput:
    """Append `ids` [S] to the one row of `cache`, image placeholders taking `features` [M, H]."""
    embeds = backend.embed(ids[None], features)
    positions = cache.lengths[:, None] + np.arange(len(ids))
    return backend.forward(embeds, positions, cache, logits_index, captures)


def read_preempted(
    backend: Backend, ids: Ints, features: Floats, cache: Cache, logits_index: Ints, between: Between
) -> Floats:
    """Append `ids` [S] as `read_piece` does, and call `between` between parts of layers; gives logits f32 [L, V]."""
    assert isinstance(backend, Preemptible)
    embeds = backend.embed(ids[None], features)
    positions = cache.lengths[:, None] + np.arange(len(ids))
    return backend.forward_preempted(embeds, positions, cache, logits_index, between)[0]


def look_preempted(backend: Backend, tile: Floats, between: Between) -> Floats:
    """The features [M, H] of a tile f32 [1, 3, h, w], with `between` called between products of the tower."""
    assert isinstance(backend, Preemptible)
    return backend.vision_preempted(tile, between)


def is_preemptible(backend: Backend) -> bool:
    """Whether a step of `backend` can be left between parts of its layers for steps of other rows."""
    return bool(getattr(backend, "preemptible", False))


def read_forced(backend: Backend, ids: Ints, features: Floats, cache: Cache, expert_ids: Mapping[int, Ints]) -> Floats:
    """Append `ids` [S] as `read_piece` does, sent to `expert_ids` [S, k] of each MoE layer; gives logits f32 [S, V]."""
    assert isinstance(backend, ForcesRouting)
    embeds = backend.embed(ids[None], features)
    positions = cache.lengths[:, None] + np.arange(len(ids))
    chosen = {layer: own[None] for layer, own in expert_ids.items()}
    return backend.forward_forced(embeds, positions, cache, np.arange(len(ids)), chosen)[0]


def forces_routing(backend: Backend) -> bool:
    """Whether tokens of `backend` can be sent to other experts than its routers choose."""
    return bool(getattr(backend, "forces_routing", False))


def append_tokens(backend: Backend, tokens: Sequence[int], cache: Cache) -> Floats:
    """Append one token to each row of `cache` and give the logits f32 [B, V] that follow."""
    embeds = backend.embed(np.asarray(tokens, np.int64)[:, None], np.zeros((0, backend.spec.hidden_size), np.float32))
    return backend.forward(embeds, cache.lengths[:, None].copy(), cache, np.array([0])).logits[:, 0]


def append_rows(backend: Backend, tokens: Sequence[Sequence[int]], cache: Cache) -> list[Floats]:
    """Append to each row of `cache` its `tokens`, at least one, in one step; gives each row's logits f32 [S, V].

    Rows of different numbers of tokens ask for a backend that packs rows.
    """
    counts = [len(row) for row in tokens]
    if max(counts) == 1:
        return list(append_tokens(backend, [row[0] for row in tokens], cache)[:, None])
    rows = [np.asarray(row, np.int64) for row in tokens]
    none = np.zeros((0, backend.spec.hidden_size), np.float32)
    if len(rows) == 1:
        return [read_piece(backend, rows[0], none, cache, np.arange(counts[0])).logits[0]]
    return [step.logits[0] for step in read_together(backend, rows, none, cache)]


def read_together(
    backend: Backend, rows: Sequence[Ints], features: Floats, cache: Cache, captures: bool = False
) -> list[StepOutput]:
    """Append to each row of `cache` its ids [S] of `rows` in one step; gives each row's logits [1, S, V] and captures.

    Image placeholders take `features` [M, H], row after row. The backend has to be one that `shares_steps`.
    """
    assert isinstance(backend, PacksRows)
    ids, counts = np.concatenate(rows), np.array([len(row) for row in rows])
    whole = backend.forward_packed(
        backend.embed(ids[None], features)[0], counts, cache, np.arange(len(ids)), captures=captures
    )
    stops = np.cumsum(counts).tolist()
    return [
        StepOutput(
            logits=whole.logits[:, start:stop],
            expert_ids={layer: chosen[:, start:stop] for layer, chosen in whole.expert_ids.items()},
            hiddens={layer: hidden[:, start:stop] for layer, hidden in whole.hiddens.items()},
        )
        for start, stop in zip([0, *stops], stops, strict=False)
    ]


def shares_steps(backend: Backend) -> bool:
    """Whether rows of at least `least_piece` tokens may share a step of `backend` without a change of their bits."""
    return hasattr(backend, "packs")


def packs_rows(backend: Backend) -> bool:
    """Whether any rows may share a step of `backend` without a change of their bits."""
    return bool(getattr(backend, "packs", False))


def least_piece(backend: Backend) -> int:
    """Tokens of a prompt that are summed in the order of a long piece; one has attention of its own kind anyhow."""
    return 2 if packs_rows(backend) else backend.few_rows + 1


def append_beside(backend: Backend, tokens: Sequence[int], ids: Ints, features: Floats, cache: Cache) -> Floats:
    """Append one of `tokens` [B] to each of the first rows of `cache` and `ids` [S] to its last, in one step.

    Image placeholders take `features` [M, H]. Gives the logits f32 [B + 1, V] that follow each of these rows.
    """
    assert isinstance(backend, PacksRows)
    rows = len(tokens)
    embeds = backend.embed(np.concatenate([np.asarray(tokens, np.int64), ids])[None], features)
    counts = np.zeros(len(cache.lengths), np.int64)
    counts[:rows], counts[-1] = 1, len(ids)
    last = np.append(np.arange(rows), rows + len(ids) - 1)
    return backend.forward_packed(embeds[0], counts, cache, last).logits[0]


def check_finite(logits: Floats) -> Floats:
    """Give `logits` [.., V] back where all are finite; else raise `NotFinite`."""
    finite = np.isfinite(logits)
    if not finite.all():
        bad = np.argwhere(~finite)
        raise NotFinite(
            f"the model gives {len(bad)} of {logits.size} logits that are not finite, the first for token {bad[0, -1]}",
            expected="finite numbers: no token can be chosen by others",
            remedy="Run `arriero parity` on the bundle, which names the layer where they arise; build it again from a "
            "sound checkpoint, or with a profile of more bits",
        )
    return logits
