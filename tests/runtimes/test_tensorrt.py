"""The TensorRT backends over recorded modules and a stand-in for the GPU: a contract test, not a run on a GPU.

Each product's recorded signatures decide what may be called; the engines compute with the PyTorch reference from the
memory that the backend bound, so its results must be the reference's, and nothing may be left behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arriero.errors import ArrieroError, MachineLacks
from arriero.export.proof.reference import TorchBackend
from arriero.runtimes import tensorrt, tensorrt_rtx
from arriero.runtimes.nvidia import device_cache, products
from arriero.runtimes.tensorrt import TensorRtBackend
from tests.tensorrt.fake_cuda import FakeCuda
from tests.tensorrt.fake_engine import FakeTensorRt, signature, write_engine
from tests.tensorrt.recorder import PRODUCTS
from tests.toys import IMAGE_TOKEN, load_reference, make_maverick_toy, make_scout_toy

BATCH, CONTEXT, CHUNK = 3, 80, 16
PARTS = ("embed", "vision", "text")


@dataclass
class Bench:
    """A bundle of engines, the backend over it, the reference, and the stand-ins behind."""

    folder: Path
    reference: TorchBackend
    cuda: FakeCuda
    trt: FakeTensorRt
    product: Any

    def open(self) -> TensorRtBackend:
        return TensorRtBackend(self.folder, self.reference.spec, self.product)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TorchBackend]:
    folder = tmp_path_factory.mktemp("toys")
    makers: dict[str, Callable[[Path, int], Path]] = {"scout": make_scout_toy, "maverick": make_maverick_toy}
    return {name: TorchBackend.of(load_reference(make(folder / name, 7))) for name, make in makers.items()}


Setter = Callable[..., Bench]


@pytest.fixture
def bench(references, tmp_path, monkeypatch) -> Iterator[Setter]:
    """Set a bench up; at the end, no stand-in may have found a fault."""
    made: list[Bench] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(device_cache, "FIRST_SLOTS", 4)

    def set_up(
        product: str = "tensorrt_11",
        model: str = "scout",
        cache: str = "FLOAT",
        cuda: str = "cuda_13",
        fixed: bool = False,
    ) -> Bench:
        reference = references[model]
        gpu = FakeCuda(cuda)
        trt = FakeTensorRt(product, gpu, reference.model)
        folder = tmp_path / f"bundle{len(made)}"
        folder.mkdir()
        for part in PARTS if reference.spec.vision else ("embed", "text"):
            write_engine(folder, part, signature(reference.model, part, BATCH, CONTEXT, cache, fixed))
        chosen = tensorrt_rtx.PRODUCT if "rtx" in product else tensorrt.PRODUCT
        modules = dict.fromkeys(chosen.modules, trt.module)
        monkeypatch.setattr(products, "import_module", modules.__getitem__)
        monkeypatch.setattr(tensorrt, "load_cuda", lambda extra: gpu.runtime)
        monkeypatch.setattr(products, "load_cuda", lambda extra: gpu.runtime)
        made.append(Bench(folder, reference, gpu, trt, chosen))
        return made[-1]

    yield set_up
    assert [fault for one in made for fault in one.cuda.faults] == []


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The toys are too small for more, and beside other work a second thread costs seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def draw(rows: int, tokens: int, seed: int = 0):
    return np.random.default_rng(seed).integers(3, 150, (rows, tokens))


def step(backend, cache, ids, captures=False, wanted=None):
    embeds = backend.embed(ids, np.zeros((0, backend.spec.hidden_size), np.float32))
    positions = cache.lengths[:, None] + np.arange(ids.shape[1])
    index = np.arange(ids.shape[1]) if wanted is None else wanted
    return backend.forward(embeds, positions, cache, index, captures)


def equal(ours, theirs, rtol=1e-5):
    assert ours.dtype == theirs.dtype
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol)


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
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    one = bench("tensorrt_rtx_1")
    one.open().close()
    assert not one.trt.recorder.named("IRuntimeCache.deserialize")
    kept = sorted((tmp_path / "cache" / "arriero").iterdir())
    assert [path.read_bytes() for path in kept] == [b"kernels for this GPU"] * 2  # embed and text
    one.open().close()
    calls = one.trt.recorder.named("IRuntimeCache.deserialize")
    assert [call.arguments["blob"] for call in calls] == [b"kernels for this GPU"] * 2
    assert sorted((tmp_path / "cache" / "arriero").iterdir()) == kept


def test_a_cache_folder_that_cannot_be_written_is_done_without(bench, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    bench("tensorrt_rtx_1").open().close()


# --- refusals


def test_steps_outside_the_agreement_are_refused(bench):
    backend = bench().open()
    with pytest.raises(ValueError, match="one token per row"):
        step(backend, backend.new_cache(2, 32), draw(2, 2))
    with pytest.raises(ValueError, match="one attention chunk"):
        step(backend, backend.new_cache(1, 32), draw(1, CHUNK + 1))
    with pytest.raises(ArrieroError, match="do not fit a cache of 4"):
        step(backend, backend.new_cache(1, 4), draw(1, 5))
    with pytest.raises(ArrieroError, match="at most 3 rows and 80 slots"):
        backend.new_cache(1, CONTEXT + 1)
    with pytest.raises(ArrieroError, match=r"a cache of 4 rows.*larger `batch`"):
        backend.new_cache(4, 8)


@pytest.mark.parametrize("function", ["cudaMalloc", "cudaMemsetAsync", "cudaStreamSynchronize"])
@pytest.mark.parametrize("after", range(6))
def test_a_failure_anywhere_is_told_and_leaves_nothing_behind(bench, function, after):
    one = bench()
    backend = one.open()
    cache = backend.new_cache(1, CONTEXT)
    step(backend, cache, draw(1, 3))
    one.cuda.fail(function, "cudaErrorMemoryAllocation", after)

    def go_on():
        for _ in range(9):
            step(backend, cache, draw(1, 1))
            backend.new_cache(1, CONTEXT)

    with pytest.raises(MachineLacks, match=rf"{function} failed.*cudaErrorMemoryAllocation.*lower `context`"):
        go_on()
    # and it goes on: a new cache works
    expected = step(one.reference, one.reference.new_cache(1, 8), draw(1, 8)).logits
    equal(step(backend, backend.new_cache(1, 8), draw(1, 8)).logits, expected)
    backend.close()
    assert one.cuda.held == {"memory": 0, "pinned": 0, "handles": 0}


def test_a_full_gpu_while_opening_leaves_nothing_behind(bench):
    one = bench()
    one.cuda.fail("cudaStreamCreateWithFlags", "cudaErrorMemoryAllocation")
    with pytest.raises(MachineLacks, match="cudaStreamCreateWithFlags failed"):
        one.open()
    assert one.cuda.held == {"memory": 0, "pinned": 0, "handles": 0}


def test_a_broken_gpu_is_no_lack_of_the_machine(bench):
    one = bench()
    backend = one.open()
    one.cuda.fail("cudaStreamSynchronize", "cudaErrorIllegalAddress", 1)
    with pytest.raises(ArrieroError, match=r"GPU: cudaStreamSynchronize failed: told in words.*report it") as caught:
        step(backend, backend.new_cache(1, 8), draw(1, 8))
    assert not isinstance(caught.value, MachineLacks)
    for handle in one.cuda.handles.values():
        handle.queue.clear()
    one.cuda.faults.clear()


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_plan_that_is_none_is_refused_with_tensorrts_own_words(bench, product):
    one = bench(product)
    (one.folder / "text.engine").write_bytes(b"no plan")
    with pytest.raises(
        ArrieroError, match=r"text\.engine: TensorRT.* does not take the plan: Serialization.*arriero build"
    ):
        one.open()
    assert one.cuda.held == {"memory": 0, "pinned": 0, "handles": 0}
    (one.folder / "text.engine").write_bytes(b"")
    with pytest.raises(ArrieroError, match="does not take the plan"):
        one.open()
    (one.folder / "text.engine").unlink()
    with pytest.raises(ArrieroError, match="the engine is missing"):
        one.open()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s.pop("profiles"), "signature cannot be read"),
        (lambda s: s["profiles"].clear(), "has no profile"),
        (lambda s: s["profiles"].pop(), "the plan has 2 profiles"),
        (lambda s: s["inputs"][0].update(dtype="FLOAT12"), "unknown type FLOAT12"),
        (lambda s: s["inputs"][0].update(dtype="FLOAT16"), "inputs_embeds is FLOAT, not FLOAT16"),
        (lambda s: s["outputs"].pop(), "outputs differ"),
        (lambda s: s["profiles"][0]["ranges"].update(odd=[[1], [1], [1]]), r"names \['odd'\]"),
    ],
)
def test_a_signature_that_does_not_fit_is_refused(bench, change, told):
    one = bench()
    described = signature(one.reference.model, "text", BATCH, CONTEXT)
    write_engine(one.folder, "text", described)
    plan = (one.folder / "text.engine").read_bytes()
    change(described)
    write_engine(one.folder, "text", described)
    (one.folder / "text.engine").write_bytes(plan)
    with pytest.raises(ArrieroError, match=told):
        one.open()


def test_an_engine_of_another_model_is_refused(bench):
    one = bench()
    other = bench(model="maverick")
    one.reference = other.reference
    with pytest.raises(ArrieroError, match=r"do not fit the manifest's model"):
        TensorRtBackend(bench().folder, _fewer_layers(other.reference.spec), tensorrt.PRODUCT)


def _fewer_layers(spec):
    import dataclasses

    return dataclasses.replace(spec, layers=spec.layers[:3])


# --- weights beside the GPU


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(("most", "kept"), [(300, 300), (900, 500)], ids=["budget", "what is free"])
def test_weights_are_streamed_beyond_what_the_gpu_has_room_for(bench, product, most, kept):
    one = bench(product)
    described = signature(one.reference.model, "text", BATCH, CONTEXT)
    write_engine(one.folder, "text", described | {"weights_on_gpu": most})
    one.trt.streamable = 1000
    one.open()
    calls = one.trt.recorder.named("ICudaEngine.weight_streaming_budget_v2=")
    assert [call.arguments["value"] for call in calls] == [kept]


@pytest.mark.parametrize("product", PRODUCTS)
def test_an_engine_with_room_for_its_weights_streams_none(bench, product):
    one = bench(product)
    one.open()
    assert not one.trt.recorder.named("ICudaEngine.weight_streaming_budget_v2=")


# --- machines


@pytest.mark.parametrize("error", ["cudaErrorNoDevice", "cudaErrorInsufficientDriver"])
def test_a_machine_without_gpu_or_driver(bench, error):
    one = bench()
    one.cuda.fail("cudaGetDeviceCount", error)
    with pytest.raises(MachineLacks, match=rf"{error}.*Install NVIDIA's driver"):
        one.open()
