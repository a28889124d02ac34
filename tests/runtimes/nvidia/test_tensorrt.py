"""The TensorRT backends over recorded modules and a stand-in for the GPU: a contract test, not a run on a GPU.

Each product's recorded signatures decide what may be called; the engines compute with the PyTorch reference from the
memory that the backend bound, so its results must be the reference's, and nothing may be left behind.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from arriero.errors import ArrieroError
from tests.tensorrt.bench import CHUNK, CONTEXT, draw, equal, step
from tests.tensorrt.recorder import PRODUCTS
from tests.toys import IMAGE_TOKEN

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("cuda", "fixed"), [("cuda_12", False), ("cuda_13", False), ("cuda_13", True)])
@pytest.mark.parametrize("model", ["scout", "maverick"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_prefill_and_decode_over_chunks_are_the_references(bench, product, model, cuda, fixed):
    one = bench(product, model, cuda=cuda, fixed=fixed)
    backend, ids = one.open(), draw(1, 40)
    ours, theirs = backend.new_cache(1, CONTEXT), one.reference.new_cache(1, CONTEXT)
    at = 0
    for count in (10, 6, 16, 1, 1, 1, 1, 3, 1):  # 16 is the chunk: the last two prefills begin at its edge
        piece = ids[:, at : at + count]
        found, expected = step(backend, ours, piece, captures=True), step(one.reference, theirs, piece, captures=True)
        equal(found.logits, expected.logits)
        assert found.expert_ids.keys() == expected.expert_ids.keys()
        assert found.hiddens.keys() == expected.hiddens.keys()
        for layer, chosen in expected.expert_ids.items():
            assert np.array_equal(found.expert_ids[layer], chosen)
        for layer, hidden in expected.hiddens.items():
            equal(found.hiddens[layer], hidden)
        at += count
    assert ours.lengths.tolist() == [at]
    backend.close()
    assert one.cuda.held == {"memory": 0, "pinned": 0, "handles": 0}


@pytest.mark.parametrize("product", PRODUCTS)
def test_decode_becomes_a_graph_that_is_recorded_anew_when_the_cache_grows(bench, product):
    one = bench(product, "maverick")
    backend, ids = one.open(), draw(1, 60, 3)
    ours, theirs = backend.new_cache(1, CONTEXT), one.reference.new_cache(1, CONTEXT)
    slots = []
    step(backend, ours, ids[:, :2])
    step(one.reference, theirs, ids[:, :2])
    for at in range(2, 40):
        piece = ids[:, at : at + 1]
        equal(step(backend, ours, piece).logits, step(one.reference, theirs, piece).logits)
        slots.append(ours.store.layer(3)[2])
    # 4, 8, 16, 32, 64 slots: each time one step by itself, then a graph for the rest
    assert sorted(set(slots)) == [4, 8, 16, 32, 64]
    assert one.cuda.captures == 5
    assert one.cuda.launches == 38 - 5
    # one context decodes: no step waited for another's memory
    assert len(one.trt.recorder.named("ICudaEngine.create_execution_context")) == 3  # embed, prefill, decode
    backend.close()
    assert one.cuda.held == {"memory": 0, "pinned": 0, "handles": 0}


@pytest.mark.parametrize("product", PRODUCTS)
def test_an_engine_with_fixed_buffers_is_recorded_once(bench, product):
    one = bench(product, "maverick", fixed=True)
    backend, ids = one.open(), draw(1, 30, 3)
    ours, theirs = backend.new_cache(1, 31), one.reference.new_cache(1, 31)
    assert [ours.store.layer(number)[2] for number in range(4)] == [CHUNK, CHUNK, CHUNK, CONTEXT]
    for at in range(30):
        piece = ids[:, at : at + 1]
        equal(step(backend, ours, piece).logits, step(one.reference, theirs, piece).logits)
    assert (one.cuda.captures, one.cuda.launches) == (1, 29)


@pytest.mark.parametrize("product", PRODUCTS)
def test_rows_of_different_lengths_decode_together_move_and_are_copied(bench, product):
    one = bench(product)
    backend = one.open()
    caches = [side.new_cache(3, CONTEXT) for side in (backend, one.reference)]
    for row, count in enumerate((5, 17, 30)):
        ids = draw(1, count, row)
        for side, cache in zip((backend, one.reference), caches, strict=True):
            for start in range(0, count, CHUNK):
                last = step(side, cache.rows(row, row + 1), ids[:, start : min(start + CHUNK, count)])
        assert last.logits.shape[0] == 1
    for turn in range(4):
        ids = draw(3, 1, 10 + turn)
        found, expected = (step(side, cache, ids) for side, cache in zip((backend, one.reference), caches, strict=True))
        equal(found.logits, expected.logits)
    for cache in caches:
        cache.copy_row(2, 0)
    for turn in range(3):
        ids = draw(2, 1, 20 + turn)
        found, expected = (
            step(side, cache.rows(0, 2), ids) for side, cache in zip((backend, one.reference), caches, strict=True)
        )
        equal(found.logits, expected.logits)
    assert caches[0].lengths.tolist() == caches[1].lengths.tolist() == [37, 24, 34]
    equal(
        step(backend, caches[0].rows(1, 2).rows(0, 1), ids[:1]).logits,
        step(one.reference, caches[1].rows(1, 2), ids[:1]).logits,
    )


@pytest.mark.parametrize(("cache", "error"), [("FLOAT16", 2e-2), ("BFLOAT16", 1e-1)])
def test_narrow_caches(bench, cache, error):
    """What is stored in 16 bits differs by that rounding, and no more."""
    one = bench(cache=cache)
    backend, ids = one.open(), draw(1, 30, 4)
    ours, theirs = backend.new_cache(1, CONTEXT), one.reference.new_cache(1, CONTEXT)
    for start in range(0, 30, 3):
        piece = ids[:, start : min(start + 3, (start // CHUNK + 1) * CHUNK)]
        if piece.shape[1] == 3:
            found, expected = (step(side, held, piece) for side, held in ((backend, ours), (one.reference, theirs)))
        else:
            found, expected = (
                [step(side, held, ids[:, at : at + 1]) for at in range(start, start + 3)][-1]
                for side, held in ((backend, ours), (one.reference, theirs))
            )
    apart = np.abs(found.logits - expected.logits).max() / np.abs(expected.logits).max()
    assert 0 < apart < error
    assert ours.store.layer(0)[1] - ours.store.layer(0)[0] >= 2 * 16 * 16 * 2  # K * P * D values of two bytes


@pytest.mark.parametrize("product", PRODUCTS)
def test_images(bench, product):
    one = bench(product)
    backend = one.open()
    tiles = np.random.default_rng(1).standard_normal((7, 3, 32, 32)).astype(np.float32)
    before = len(one.trt.recorder.named("Runtime.deserialize_cuda_engine"))
    features = backend.vision(tiles)
    equal(features, one.reference.vision(tiles), 1e-4)
    ids = draw(1, 12)
    ids[0, 2:6] = IMAGE_TOKEN
    equal(backend.embed(ids, features[:4]), one.reference.embed(ids, features[:4]))
    backend.vision(tiles[:1])
    # loaded on the first image, once; seven tiles in groups of the three that the engine takes
    assert len(one.trt.recorder.named("Runtime.deserialize_cuda_engine")) == before + 1 == 3


@pytest.mark.parametrize("shape", [(1, 64), (1, 150), (4, 1), (5, 70)])
def test_any_number_of_tokens_is_embedded(bench, shape):
    one = bench()
    ids = draw(*shape)
    ids.flat[::3] = IMAGE_TOKEN
    features = np.random.default_rng(2).standard_normal((int(np.sum(ids == IMAGE_TOKEN)), 64)).astype(np.float32)
    more = np.concatenate([features, np.ones((70, 64), np.float32)])  # a surplus is not looked at
    equal(one.open().embed(ids, more), one.reference.embed(ids, features))


def test_a_text_only_bundle_refuses_images(bench):
    with pytest.raises(ArrieroError, match="no vision tower"):
        bench(model="maverick").open().vision(np.zeros((1, 3, 32, 32), np.float32))


@pytest.mark.parametrize("product", PRODUCTS)
def test_threads_answer_as_alone(bench, product):
    one = bench(product)
    backend = one.open()

    def answer(seed: int):
        cache, ids = backend.new_cache(1, CONTEXT), draw(1, 9, seed)
        logits = step(backend, cache, ids, wanted=np.array([8])).logits
        chosen = []
        for _ in range(12):
            chosen.append(int(logits[0, -1, :150].argmax()))
            logits = step(backend, cache, np.array([chosen[-1:]])).logits
        return chosen

    alone = [answer(seed) for seed in range(6)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(answer, range(6))) == alone
    assert len({tuple(answer) for answer in alone}) > 1
    backend.close()
    assert one.cuda.held == {"memory": 0, "pinned": 0, "handles": 0}


def test_taps_cross_to_the_host_only_when_asked(bench):
    one = bench()
    backend = one.open()
    cache, ids = backend.new_cache(1, CONTEXT), draw(1, 8)
    to_host = one.cuda.runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost

    def copied() -> int:
        calls = one.cuda.recorder.named("cudaMemcpyAsync")
        return sum(call.arguments["count"] for call in calls if call.arguments["kind"] == to_host)

    embeds = backend.embed(ids, np.zeros((0, 64), np.float32))
    before = copied()
    plain = backend.forward(embeds, np.arange(8)[None], cache, np.array([7]))
    assert copied() - before == 160 * 4
    assert not plain.hiddens
    assert not plain.expert_ids
    again = backend.forward(embeds, np.arange(8)[None], backend.new_cache(1, CONTEXT), np.array([7]), captures=True)
    assert copied() - before == 2 * 160 * 4 + 4 * (8 * 64 * 4 + 8 * 8)
    assert np.array_equal(plain.logits, again.logits)


def test_taps_come_and_go_between_steps_of_one_shape(bench):
    one = bench(fixed=True)
    backend = one.open()
    ours, theirs = backend.new_cache(1, 16), one.reference.new_cache(1, 16)
    for turn, captures in enumerate((False, False, True, False, True, True, False)):
        ids = draw(1, 1, turn)
        found, expected = step(backend, ours, ids, captures), step(one.reference, theirs, ids, captures)
        equal(found.logits, expected.logits)
        assert sorted(found.hiddens) == sorted(found.expert_ids) == ([0, 1, 2, 3] if captures else [])
        for layer, hidden in found.hiddens.items():
            equal(hidden, expected.hiddens[layer])


def test_dropped_caches_give_their_memory_back(bench):
    one = bench()
    backend = one.open()
    step(backend, backend.new_cache(1, CONTEXT), draw(1, 4))
    before = one.cuda.held
    for _ in range(3):
        step(backend, backend.new_cache(1, CONTEXT), draw(1, 4))
    assert one.cuda.held == before


def test_memory_that_is_dropped_while_a_step_is_recorded_is_freed_after_it(bench):
    """Python may collect garbage at any time, and freeing memory breaks a capture."""
    one = bench()
    backend = one.open()
    dropped = [backend.new_cache(1, 8)]
    one.trt.while_capturing = dropped.clear
    cache = backend.new_cache(1, 4)
    for _ in range(3):
        held = one.cuda.held["memory"]
        step(backend, cache, draw(1, 1))
    assert (one.cuda.captures, one.cuda.launches, backend._text._idle[0][1].graphs_refused) == (1, 2, None)
    assert not dropped
    assert one.cuda.held["memory"] == held
    backend.close()
    assert one.cuda.held == {"memory": 0, "pinned": 0, "handles": 0}


def test_a_cache_comes_back_to_the_context_that_recorded_its_step(bench):
    one = bench(fixed=True)
    backend = one.open()
    first, second = (backend.new_cache(1, 16) for _ in range(2))
    step(backend, first, draw(1, 1))
    taken = backend._text._idle.pop()  # as another thread would hold it
    step(backend, second, draw(1, 1))
    backend._text._idle.append(taken)
    for _ in range(6):
        step(backend, first, draw(1, 1))
        step(backend, second, draw(1, 1))
    assert (one.cuda.captures, one.cuda.launches) == (2, 12)


@pytest.mark.parametrize("product", PRODUCTS)
def test_an_engine_that_cannot_be_recorded_still_decodes(bench, product):
    one = bench(product)
    one.trt.capture_works = False
    backend = one.open()
    cache, theirs = backend.new_cache(1, CONTEXT), one.reference.new_cache(1, CONTEXT)
    ids = draw(1, 8)
    sides = ((backend, cache), (one.reference, theirs))

    def decode():
        for at in range(8):
            found, expected = (step(side, held, ids[:, at : at + 1]) for side, held in sides)
            equal(found.logits, expected.logits)

    with pytest.warns(RuntimeWarning, match="decoding runs without CUDA graphs"):
        decode()
    assert one.cuda.launches == 0


def test_rtx_records_once_its_kernels_are_there(bench):
    one = bench("tensorrt_rtx_1")
    one.trt.capturable = False
    backend = one.open()
    cache = backend.new_cache(1, 4)
    for _ in range(3):
        step(backend, cache, draw(1, 1))
    assert one.cuda.captures == 0
    one.trt.capturable = True
    step(backend, cache, draw(1, 1))
    assert (one.cuda.captures, one.cuda.launches) == (1, 1)
    caches = one.trt.recorder.named("IRuntimeConfig.set_runtime_cache")
    assert len(caches) == 2  # embed and text: one for each engine, whatever the number of contexts


def test_rtx_kernels_are_kept_for_the_next_process(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("ARRIERO_CACHE", str(tmp_path / "cache"))
    one = bench("tensorrt_rtx_1")
    one.open().close()
    assert not one.trt.recorder.named("IRuntimeCache.deserialize")
    kept = sorted((tmp_path / "cache").iterdir())
    kernels = b"kernels for this GPU"
    assert [path.read_bytes() for path in kept] == [hashlib.sha256(kernels).digest() + kernels] * 2  # embed and text
    one.open().close()
    calls = one.trt.recorder.named("IRuntimeCache.deserialize")
    assert [call.arguments["blob"] for call in calls] == [kernels] * 2
    assert sorted((tmp_path / "cache").iterdir()) == kept


def test_rtx_kernels_that_were_changed_are_compiled_and_kept_anew(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("ARRIERO_CACHE", str(tmp_path / "cache"))
    one = bench("tensorrt_rtx_1")
    one.open().close()
    kept = sorted((tmp_path / "cache").iterdir())
    sound = [path.read_bytes() for path in kept]
    kept[0].write_bytes(sound[0][:-1] + b"!")
    kept[1].write_bytes(b"cut")
    with pytest.warns(RuntimeWarning, match="compiled anew: they were changed or damaged") as warned:
        one.open().close()
    said = [str(one.message) for one in warned]
    assert len(said) == 2
    assert all(any(str(path) in one for one in said) for path in kept)
    assert not one.trt.recorder.named("IRuntimeCache.deserialize")
    assert [path.read_bytes() for path in kept] == sound


def test_rtx_kernels_of_another_gpu_are_compiled_anew_and_that_is_said(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("ARRIERO_CACHE", str(tmp_path / "cache"))
    one = bench("tensorrt_rtx_1")
    one.open().close()
    one.trt.fitting = False
    with pytest.warns(RuntimeWarning, match="compiled anew: they are of another driver or GPU"):
        one.open().close()


def test_rtx_kernels_behind_a_link_are_not_those_that_were_kept(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("ARRIERO_CACHE", str(tmp_path / "cache"))
    one = bench("tensorrt_rtx_1")
    one.open().close()
    for number, path in enumerate(sorted((tmp_path / "cache").iterdir())):
        path.rename(tmp_path / f"elsewhere{number}")
        path.symlink_to(tmp_path / f"elsewhere{number}")
    one.open().close()
    assert not one.trt.recorder.named("IRuntimeCache.deserialize")


def test_a_cache_folder_that_cannot_be_written_is_done_without(bench, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("ARRIERO_CACHE", str(tmp_path / "file"))
    bench("tensorrt_rtx_1").open().close()


# --- refusals
