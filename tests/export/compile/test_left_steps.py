"""A step of a prompt is left between blocks of its products, experts and queries, with the same bits; or given up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm", reason="needs apache-tvm: pip install 'arriero[tvm]'")

from arriero.runtimes.steps import append_tokens
from tests.export.compile.test_packed_rows import compiled

CHUNK = 512
ROWS = 128  # of a product or an expert that are not left
QUERIES = 192 // 2  # of an attention of two heads to a key that are not left
FEW, PIECES = 20, (300, 212)
LAST = 6  # products of the last token alone: of the last layer after its attention, which is one block, and the head's


@pytest.mark.parametrize(("profile", "choices", "threads"), [("fp32", 1, 2), ("int4", 2, 3)])
def test_a_long_piece_is_left_often_and_keeps_its_bits(
    tmp_path: Path, kernels: Path, profile: str, choices: int, threads: int
) -> None:
    chunks = {"attention_chunk_size": CHUNK, "max_position_embeddings": 2 * CHUNK}
    widths = {"intermediate_size": 64, "intermediate_size_mlp": 64}  # whole blocks of int4
    backend = compiled(tmp_path, kernels, profile, **chunks, **widths, num_experts_per_tok=choices)
    backend._graphs["text"]._threads = threads
    layers = len(backend.spec.layers)
    hidden = np.random.default_rng(2).standard_normal((1, CHUNK, backend.spec.hidden_size), np.float32)
    cache = backend.new_cache(3, CHUNK + 200)

    def read(row: int, start: int, count: int) -> tuple[np.ndarray, int]:
        """The last token's logits, and how many blocks of rows the experts of the layers have."""
        step = backend.forward(
            hidden[:, start : start + count],
            np.arange(start, start + count)[None],
            cache.rows(row, row + 1),
            np.array([count - 1]),
            captures=True,
        )
        *others, last = step.expert_ids.values()
        rows = [np.unique(ids, return_counts=True)[1] for ids in (*others, last[:, -1])]
        return step.logits, int(sum((-(-counts // ROWS)).sum() for counts in rows))

    def read_left(start: int, count: int) -> tuple[np.ndarray, int]:
        """The same of row 1, with a decode step of row 2 wherever it is left, and how often that was."""
        before = int(cache.lengths[2])
        logits = backend.forward_preempted(
            hidden[:, start : start + count],
            np.arange(start, start + count)[None],
            cache.rows(1, 2),
            np.array([count - 1]),
            lambda: decoded.append(append_tokens(backend, [len(decoded) % 7], cache.rows(2, 3))),
        )
        return logits, int(cache.lengths[2]) - before

    decoded: list[np.ndarray] = []
    _, experts = read(0, 0, FEW)
    cache.truncate(0, 0)
    _, left = read_left(0, FEW)
    cache.truncate(1, 0)
    products = left - layers - experts  # one block of queries in each layer
    assert products > 4 * layers
    start = 0
    for count in PIECES:
        alone, experts = read(0, start, count)
        logits, left = read_left(start, count)
        np.testing.assert_array_equal(logits, alone)
        blocks, queries = -(-count // ROWS), -(-count // QUERIES)
        assert left == (products - LAST) * blocks + LAST + queries * (layers - 1) + 1 + experts
        start += count
    cache.truncate(2, 0)
    for token, logits in enumerate(decoded):
        np.testing.assert_array_equal(append_tokens(backend, [token % 7], cache.rows(2, 3)), logits)
    following = [append_tokens(backend, [3], cache.rows(row, row + 1)) for row in (0, 1)]
    np.testing.assert_array_equal(*following)
