"""What the TensorRT backends refuse, what ends badly, and that nothing is left behind of either."""

from __future__ import annotations

import pytest

from arriero.errors import ArrieroError, MachineLacks
from arriero.runtimes import tensorrt
from arriero.runtimes.tensorrt import TensorRtBackend
from tests.tensorrt.bench import BATCH, CHUNK, CONTEXT, draw, equal, step
from tests.tensorrt.fake_cuda import BROKEN
from tests.tensorrt.fake_engine import signature, write_engine
from tests.tensorrt.recorder import PRODUCTS

pytestmark = pytest.mark.usefixtures("one_thread")


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
    one.cuda.fail("cudaStreamSynchronize", BROKEN, 1)
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
