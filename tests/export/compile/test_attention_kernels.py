"""Attention of the C++ kernels against float64 numpy, at every level that can be run here, over every kind of cache."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from tests import kernel_judge as judge
from tests.guarded_kernels import Guarded, assert_close, normal

CACHES = ("float32", "float16", "int8")
# Of a weighted mean of numbers of about 1: float32's own, and where codes are read for one token also what 16 bits of a
# query and of a weight leave out.
MEAN_ERROR = {"float32": 1e-5, "float16": 1e-5, "int8": 3e-4}


@pytest.fixture
def kernels(kernels_at_level):
    return kernels_at_level


class Layer:
    """A layer's caches [B, G, C, D] of one dtype, holding random keys and values, as slots hold and as they count."""

    def __init__(self, draw, dtype, batch, groups, slots, size):
        self.steps = (None, None)
        if dtype == "int8":
            self.steps = tuple(draw.uniform(0.02, 0.04, (groups, size)).astype(np.float32) for _ in range(2))
        self.caches = [self.stored(normal(draw, batch, groups, slots, size), kind).astype(dtype) for kind in range(2)]

    def stored(self, numbers, kind):
        """What the cache keeps of `numbers` [B, G, S, D]."""
        if self.steps[kind] is None:
            return numbers
        return np.clip(np.rint(numbers / self.steps[kind][:, None]), -128, 127)

    def kept(self, numbers, kind):
        """What is read of `numbers` [B, G, S, D] once they were stored."""
        stored = self.stored(numbers, kind).astype(self.caches[kind].dtype)
        return self.worth(stored, kind)

    def worth(self, stored, kind):
        step = 1 if self.steps[kind] is None else self.steps[kind][:, None].astype(np.float64)
        return stored * step

    def attend(self, kernels, q, k, v, positions, chunk=0):
        """What the kernels give, and what they are to give: [B, S, Q*D] both."""
        before = [self.worth(cache.copy(), kind) for kind, cache in enumerate(self.caches)]
        (batch, steps, _), (groups, _, size) = q.shape, self.caches[0].shape[1:]
        found = kernels.attention(q, k, v, positions, *self.caches, chunk, self.steps)
        new = [x.reshape(batch, steps, groups, size).swapaxes(1, 2) for x in (k, v)]
        kept = [self.kept(x, kind).swapaxes(1, 2) for kind, x in enumerate(new)]
        start = positions[:, 0] % chunk if chunk else positions[:, 0]
        asked = q.reshape(batch, steps, -1, size)
        return found, judge.attention(asked, *kept, start, *before).reshape(found.shape)


@pytest.mark.parametrize(
    ("heads", "groups", "size"), [(4, 2, 16), (5, 1, 128), (12, 2, 64), (2, 2, 80), (9, 1, 32)], ids="{}".format
)
@pytest.mark.parametrize(("start", "steps"), [(0, 1), (70, 1), (131, 1), (0, 33), (50, 40), (0, 130)])
@pytest.mark.parametrize("dtype", CACHES)
def test_attention(kernels, draw, dtype, heads, groups, size, start, steps):
    layer = Layer(draw, dtype, 1, groups, 200, size)
    q, k, v = (normal(draw, 1, steps, n * size) for n in (heads, groups, groups))
    for cache in layer.caches:
        cache[:, :, start:] = np.nan if dtype != "int8" else 127  # nobody may look at slots that hold no token
    before = [cache.copy() for cache in layer.caches]
    found, wanted = layer.attend(kernels, q, k, v, start + np.arange(steps)[None])
    assert_close(found, wanted, 1.0, MEAN_ERROR[dtype])
    for kind, (cache, old, new) in enumerate(zip(layer.caches, before, (k, v), strict=True)):
        new = layer.stored(new.reshape(1, steps, groups, size).swapaxes(1, 2), kind).astype(dtype)
        assert_array_equal(cache[:, :, start : start + steps], new)
        assert_array_equal(cache[:, :, :start], old[:, :, :start])
        assert_array_equal(cache[:, :, start + steps :], old[:, :, start + steps :])


@pytest.mark.parametrize("dtype", CACHES)
def test_attention_of_rows_of_different_lengths_in_chunks(kernels, draw, dtype):
    """Row b's token is at its own position; a chunked layer's cache holds its chunk from slot 0 on."""
    heads, groups, size, chunk = 4, 2, 32, 64
    positions = np.array([[5], [64], [200], [127]])
    layer = Layer(draw, dtype, 4, groups, chunk, size)
    q, k, v = (normal(draw, 4, 1, n * size) for n in (heads, groups, groups))
    assert_close(*layer.attend(kernels, q, k, v, positions, chunk), 1.0, MEAN_ERROR[dtype])


@pytest.mark.parametrize("dtype", CACHES)
def test_long_rows_are_summed_in_spans(kernels, draw, dtype):
    """Beside rows of one span; the largest score lies in any of them, and is far above the others'."""
    heads, groups, size = 6, 2, 48
    layer = Layer(draw, dtype, 5, groups, 3000, size)
    positions = np.array([[2999], [1024], [1023], [7], [2047]])
    q, k, v = (3 * normal(draw, 5, 1, n * size) for n in (heads, groups, groups))
    assert_close(*layer.attend(kernels, q, k, v, positions), 1.0, 3 * MEAN_ERROR[dtype])


@pytest.mark.parametrize("dtype", CACHES)
def test_many_small_weights_count_beside_one_large_one(kernels, draw, dtype):
    """Four thousand keys whose weights are e**-11 of the first's, as beside an attention sink."""
    size = 32
    layer = Layer(draw, dtype, 1, 1, 4000, size)
    for kind, cache in enumerate(layer.caches):
        step = np.ones((1, size)) if layer.steps[kind] is None else layer.steps[kind]
        cache[...] = np.rint(0.5 / step[:, None]) if dtype == "int8" else 0.5
        cache[0, 0, 0] = -cache[0, 0, 1]
    q = np.full((1, 1, size), -11 / np.sqrt(size), np.float32)  # scores of 5.5 and of -5.5
    k, v = (np.full((1, 1, size), 0.5, np.float32) for _ in range(2))
    found, wanted = layer.attend(kernels, q, k, v, np.array([[3999]]))
    assert -0.45 < wanted.mean() < -0.4
    # the largest and its 63 neighbours are rounded together: at worst each by half a step of 16 bits
    assert_close(found, wanted, 1.0, 64 * 0.5 / 32767 if dtype == "int8" else 1e-5)


@pytest.mark.parametrize("dtype", CACHES)
def test_a_row_attends_the_same_bits_beside_others_and_in_any_number_of_parts(library, draw, dtype):
    heads, groups, size, slots = 10, 2, 64, 2500
    layer = Layer(draw, dtype, 4, groups, slots, size)
    positions = np.array([[2400], [3], [1500], [1024]])
    q, k, v = (normal(draw, 4, 1, n * size) for n in (heads, groups, groups))
    outcomes = [
        Guarded(library, parts).attention(q, k, v, positions, *(cache.copy() for cache in layer.caches), 0, layer.steps)
        for parts in (1, 2, 7)
    ]
    for row in range(4):
        caches = [cache[row : row + 1].copy() for cache in layer.caches]
        one = [x[row : row + 1] for x in (q, k, v, positions)]
        outcomes.append(Guarded(library, 3).attention(*one, *caches, 0, layer.steps))
        assert_array_equal(outcomes[-1][0], outcomes[0][row])
    assert_array_equal(outcomes[1], outcomes[0])
    assert_array_equal(outcomes[2], outcomes[0])


@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize("chunk", [0, 1500])
def test_rows_of_different_numbers_of_tokens_attend_as_each_does_alone(kernels, draw, dtype, chunk):
    """Some decode, some are read, some have no token in this step."""
    heads, groups, size, slots = 10, 2, 64, 1500
    counts, first = np.array([1, 0, 37, 1, 2, 1]), np.array([1400, 3, 20, 7, 100, 1100]) + chunk
    layer = Layer(draw, dtype, len(counts), groups, slots, size)
    starts = np.concatenate([[0], np.cumsum(counts)])
    q, k, v = (normal(draw, 1, starts[-1], n * size) for n in (heads, groups, groups))
    positions = np.concatenate([start + np.arange(count) for start, count in zip(first, counts, strict=True)])
    caches = [cache.copy() for cache in layer.caches]
    found = kernels.attention(q, k, v, positions[None], *caches, chunk, layer.steps, starts)
    for row, (start, stop) in enumerate(pairwise(starts)):
        own = [cache[row : row + 1].copy() for cache in layer.caches]
        if stop > start:
            one = [x[:, start:stop] for x in (q, k, v)]
            alone = kernels.attention(*one, positions[None, start:stop], *own, chunk, layer.steps)
            assert_array_equal(found[:, start:stop], alone)
        for kept, expected in zip(caches, own, strict=True):
            assert_array_equal(kept[row], expected[0])


def test_numbers_become_the_nearest_float16(kernels, draw):
    """Ties to even, subnormals, what is too large, and NaN."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (halves[:-1] + halves[1:]) / 2
    edges = np.float32([65519.99, 65520, 1e9, np.inf, 0, 2**-25, 1.0001 * 2**-25, 2**-24, np.nan])
    numbers = np.concatenate([between[::37], np.nextafter(between[::41], 0), edges])
    numbers = np.concatenate([numbers, -numbers, np.zeros(-2 * len(numbers) % 32, np.float32)]).reshape(1, -1, 32)
    cache = [np.zeros((1, 1, numbers.shape[1], 32), np.float16) for _ in range(2)]
    with np.errstate(over="ignore"):
        expected = numbers.astype(np.float16)
    kernels.attention(np.zeros_like(numbers), numbers, numbers, np.arange(numbers.shape[1])[None], *cache, 0)
    for kept in cache:
        assert_array_equal(kept[0, 0], expected[0])


@pytest.mark.parametrize("dtype", CACHES)
def test_a_querys_bits_do_not_depend_on_the_piece_that_it_is_read_in(kernels, draw, dtype):
    heads, groups, size, length = 10, 2, 64, 150
    q, k, v = (normal(draw, 1, length, n * size) for n in (heads, groups, groups))
    steps, outcomes = Layer(draw, dtype, 1, groups, 1, size).steps, []
    for piece in (150, 64, 39, 20):  # blocks hold nineteen queries; the last piece ends in one of a single query
        caches, rows = [np.zeros((1, groups, 200, size), dtype) for _ in range(2)], []
        for start in range(0, length, piece):
            part = slice(start, min(start + piece, length))
            positions = np.arange(part.start, part.stop)[None]
            rows.append(kernels.attention(q[:, part], k[:, part], v[:, part], positions, *caches, 0, steps))
        outcomes.append(np.concatenate(rows, axis=1))
    for other in outcomes[1:]:
        assert_array_equal(other, outcomes[0])


def test_attention_with_large_scores_does_not_overflow(kernels, draw):
    q, k, v = (normal(draw, 1, 70, 64) * scale for scale in (100, 100, 1))
    caches = [np.zeros((1, 1, 70, 64), np.float32) for _ in range(2)]
    found = kernels.attention(q, k, v, np.arange(70)[None], *caches, 0)
    split = [values.reshape(1, 70, 1, 64) for values in (q, k, v)]
    wanted = judge.attention(*split, [0], *caches).reshape(found.shape)
    # scores near 1e5 have float32 errors near 1e-2, which exp turns into the same relative error of a weight
    assert_close(found, wanted, 1.0, 0.05)
