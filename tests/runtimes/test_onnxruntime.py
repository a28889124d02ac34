"""The ONNX Runtime backend against the numpy toy, whose attention masks are explicit and whose cache never restarts."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import arriero
from arriero.errors import ArrieroError
from arriero.runtimes import kvcache
from arriero.runtimes.onnxruntime import OrtBackend
from arriero.runtimes.session import Session

# float32 sums in another order: the toy's logits reach 40, five units in their last place
TOLERANCE = 2e-4


@pytest.fixture
def backend(bundle, toy, monkeypatch):
    monkeypatch.setattr(kvcache, "FIRST_SLOTS", 4)  # so that short tests see the buffers grow
    return OrtBackend(bundle, toy.spec, threads=1)


def ids(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, count)


def read(backend, cache, tokens):
    empty = np.zeros((0, backend.spec.hidden_size), np.float32)
    embeds = backend.embed(tokens, empty)
    positions = cache.lengths[:, None] + np.arange(tokens.shape[1])
    return backend.forward(embeds, positions, cache, np.arange(tokens.shape[1]), taps=True)


def test_prefill_and_decode_match_explicit_masks_over_chunks(backend, toy):
    tokens = ids(29)[None]  # chunks of 8: three boundaries
    expected = read(toy, toy.new_cache(1, 29), tokens)
    cache = backend.new_cache(1, 29)
    cuts = [0, 5, 8, 9, 10, 16, *range(17, 30)]
    parts = [read(backend, cache, tokens[:, a:b]) for a, b in pairwise(cuts)]
    np.testing.assert_allclose(np.concatenate([p.logits for p in parts], 1), expected.logits, atol=TOLERANCE)
    for layer in range(2):
        hidden = np.concatenate([p.hiddens[layer] for p in parts], 1)
        np.testing.assert_allclose(hidden, expected.hiddens[layer], atol=TOLERANCE)
    assert np.array_equal(np.concatenate([p.expert_ids[0] for p in parts], 1), expected.expert_ids[0])
    assert cache.lengths.tolist() == [29]


def test_steps_write_into_the_same_memory_and_touch_only_their_slots(backend):
    cache = backend.new_cache(1, 8)
    cache.reserve(8)
    keys, _ = cache.layer(1)
    address = keys.ctypes.data
    read(backend, cache, ids(3)[None])
    held = keys[:, :, :3].copy()
    assert np.all(held != 0)
    assert np.all(keys[:, :, 3:] == 0)
    read(backend, cache, ids(1)[None])
    assert cache.layer(1)[0].ctypes.data == address
    assert np.array_equal(keys[:, :, :3], held)
    assert np.all(keys[:, :, 3] != 0)


def test_chunked_layers_keep_one_chunk_and_global_layers_double(backend):
    cache = backend.new_cache(1, 40)
    sizes = []
    for _ in range(30):
        read(backend, cache, ids(1)[None])
        sizes.append([cache.layer(i)[0].shape[2] for i in range(2)])
    assert sizes[3] == [4, 4]
    assert sizes[4] == [8, 8]
    assert sizes[8] == [8, 16]
    assert sizes[29] == [8, 32]


def test_batched_decode_of_rows_of_other_lengths(backend, toy):
    lengths = [3, 8, 13, 15]  # before, at and after chunk boundaries
    cache = backend.new_cache(4, 32)
    judges = []
    for row, length in enumerate(lengths):
        tokens = ids(length, seed=row)[None]
        judges.append(toy.new_cache(1, 32))
        read(toy, judges[-1], tokens)
        for start in range(0, length, 8):
            read(backend, cache.rows(row, row + 1), tokens[:, start : start + 8])
    for step in range(12):
        tokens = ids(4, seed=100 + step)[:, None]
        found = read(backend, cache, tokens)
        for row in range(4):
            expected = read(toy, judges[row], tokens[row : row + 1])
            np.testing.assert_allclose(found.logits[row : row + 1], expected.logits, atol=TOLERANCE)
            assert found.expert_ids[0][row, 0] == expected.expert_ids[0][0, 0]
    cache.copy_row(3, 0)
    both = read(backend, cache.rows(0, 4), np.full((4, 1), 7))
    np.testing.assert_allclose(both.logits[0], both.logits[3], atol=TOLERANCE)


def test_steps_outside_the_agreement_are_refused(backend):
    cache = backend.new_cache(2, 32)
    with pytest.raises(ValueError, match="one token per row"):
        read(backend, cache, ids(4).reshape(2, 2))
    with pytest.raises(ValueError, match="one attention chunk"):
        read(backend, backend.new_cache(1, 32), ids(9)[None])
    with pytest.raises(ArrieroError, match="do not fit a cache of 4"):
        read(backend, backend.new_cache(1, 4), ids(5)[None])


def test_loaded_session_equals_the_toy_with_images(bundle, toy, processor):
    session, judge = arriero.load(bundle, threads=1), Session(toy, processor, context=64)
    image = np.random.default_rng(1).integers(0, 255, (20, 50, 3), np.uint8)
    prompt = session.encode("look: <|image|> and", [image])
    assert prompt.pixel_values.shape == (3, 3, 28, 28)  # two tiles and the global one
    np.testing.assert_allclose(
        session.logits(prompt.input_ids, prompt.pixel_values).logits,
        judge.logits(prompt.input_ids, prompt.pixel_values).logits,
        atol=TOLERANCE,
    )
    answer = session.generate("look: <|image|> and", [image], max_tokens=6)
    assert answer.token_ids == judge.generate("look: <|image|> and", [image], max_tokens=6).token_ids
    prompts = ["a", "longer than one chunk", "b"]
    alone = [session.generate(text, max_tokens=20).token_ids for text in prompts]
    assert [a.token_ids for a in session.generate_batch(prompts, max_tokens=20)] == alone


def test_two_sessions_and_four_threads_answer_as_alone(bundle):
    sessions = [arriero.load(bundle, threads=1) for _ in range(2)]
    image = np.random.default_rng(3).integers(0, 255, (28, 28, 3), np.uint8)
    cases = [(f"case {i}", [image] if i % 3 == 0 else []) for i in range(16)]

    def answer(number):
        text, images = cases[number]
        settings = {"max_tokens": 25, "temperature": 0.7, "seed": number}
        return sessions[number % 2].generate(text, images, **settings).token_ids

    alone = [answer(number) for number in range(len(cases))]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(answer, range(len(cases)))) == alone
    assert len({tuple(tokens) for tokens in alone}) == len(cases)


def test_a_graph_of_another_model_is_refused(bundle, toy, tmp_path: Path):
    (tmp_path / "text.onnx").write_bytes((bundle / "vision.onnx").read_bytes())
    (tmp_path / "embed.onnx").write_bytes((bundle / "embed.onnx").read_bytes())
    with pytest.raises(ArrieroError, match="do not fit the manifest's model"):
        OrtBackend(tmp_path, toy.spec, 1)
    (tmp_path / "text.onnx").write_bytes(b"no graph")
    with pytest.raises(ArrieroError, match=r"refuses the graph.*arriero build"):
        OrtBackend(tmp_path, toy.spec, 1)
