"""Steps whose tokens are sent to named experts, on both CPU backends, held against PyTorch's with the same experts."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from arriero.errors import ArrieroError
from arriero.export.build_file.model_spec import model_spec
from arriero.export.compile import Device, build_kernels
from arriero.export.proof.reference import TorchBackend
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.config import ModelConfig
from arriero.graphs.lower import onnxruntime as ort_lowering
from arriero.graphs.lower import tvm as tvm_lowering
from arriero.graphs.lower.part import Lowering
from arriero.graphs.passes.add_forced_routing import INPUT
from arriero.graphs.trace import trace_embed, trace_text
from arriero.profiles.recipe import load_profile
from arriero.runtimes.backend import MemoryCap
from arriero.runtimes.forced_routing import PREFIX
from arriero.runtimes.memory_cap import MemoryShare
from arriero.runtimes.onnxruntime import OrtBackend
from arriero.runtimes.steps import forces_routing
from arriero.traits import PREFILL_PIECE
from tests.export.compile.conftest import HERE
from tests.toys import make_maverick_toy, make_scout_toy

EXPERTS, CHOSEN, CHUNK = 4, 2, 16


def lowered(folder, lowering, make, **changes):
    """A toy's text and embed graphs in `folder`/out, and the toy."""
    toy, out = make(folder / "toy", 3, **changes), folder / "out"
    config, checkpoint = ModelConfig.load(toy), Checkpoint.open(toy)
    schemes = load_profile("fp32").assign(checkpoint.tensors)
    for part, trace in (("text", trace_text), ("embed", trace_embed)):
        canonical = trace(config, checkpoint, folder / f"{part}.onnx")
        lowering.lower(part, canonical, Lowering(config, checkpoint, schemes, out))
    return toy, out


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """The object file of our kernels for this machine, which needs no whole build."""
    path = tmp_path_factory.mktemp("kernels") / "kernels.o"
    build_kernels.build_kernels(HERE, path)
    return path


@pytest.fixture(scope="module", params=["onnxruntime", "tvm"])
def sides(request, tmp_path_factory):
    """A backend that chooses two of four experts, and PyTorch with the same weights."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "tvm":
        pytest.importorskip("tvm", reason="needs apache-tvm: pip install 'arriero[tvm]'")
        from arriero.export.compile.tvm import compile_graphs
        from arriero.runtimes.tvm import TvmBackend

        toy, out = lowered(folder, tvm_lowering, make_scout_toy, vision=False, num_experts_per_tok=CHOSEN)
        compile_graphs(out, ["text", "embed"], Device(kernels=request.getfixturevalue("kernels")))
        return TvmBackend(out, model_spec(ModelConfig.load(toy)), threads=2), TorchBackend(toy)
    toy, out = lowered(folder, ort_lowering, make_scout_toy, vision=False, num_experts_per_tok=CHOSEN)
    return OrtBackend(out, model_spec(ModelConfig.load(toy)), 1), TorchBackend(toy)


def run(backend, ids, expert_ids=None, captures=False, cache=None):
    """The step of `ids` [B, S], from a new cache's beginning, or on in `cache`."""
    cache = cache or backend.new_cache(len(ids), 64)
    embeds = backend.embed(ids, np.zeros((0, backend.spec.hidden_size), np.float32))
    step = embeds, cache.lengths[:, None] + np.arange(ids.shape[1]), cache, np.arange(ids.shape[1])
    return backend.forward(*step, captures) if expert_ids is None else backend.forward_forced(*step, expert_ids)


def drawn_tokens(rows, steps):
    return np.random.default_rng(0).integers(3, 150, (rows, steps))


def drawn_experts(backend, rows, steps):
    draw = np.random.default_rng(1)
    return {
        layer: np.argsort(draw.random((rows, steps, EXPERTS)), -1)[..., :CHOSEN]
        for layer in range(len(backend.spec.layers))
    }


def test_a_steps_own_experts_forced_upon_it_change_no_bit(sides):
    backend, _ = sides
    assert forces_routing(backend)
    ids = drawn_tokens(1, CHUNK)
    free = run(backend, ids, captures=True)
    np.testing.assert_array_equal(run(backend, ids, free.expert_ids), free.logits)
    undecided = {layer: np.full_like(own, -1) for layer, own in free.expert_ids.items()}
    np.testing.assert_array_equal(run(backend, ids, undecided), free.logits)


def test_other_experts_forced_upon_a_step_give_what_pytorch_gives_with_them(sides):
    backend, reference = sides
    ids, other = drawn_tokens(1, CHUNK), drawn_experts(backend, 1, CHUNK)
    expected = run(reference, ids, other)
    assert np.abs(run(reference, ids).logits - expected).max() > 0.1
    np.testing.assert_allclose(run(backend, ids, other), expected, atol=1e-5 * np.abs(expected).max())


def test_each_row_of_a_batch_has_its_own_experts_and_the_next_step_chooses_again(sides):
    backend, reference = sides
    ids, other = drawn_tokens(3, 2), drawn_experts(backend, 3, 2)
    caches = backend.new_cache(3, 64), reference.new_cache(3, 64)
    for step in range(2):  # what is forced is in the cache, which the second step reads
        own = {layer: chosen[:, step : step + 1] for layer, chosen in other.items()}
        got, expected = (
            run(one, ids[:, step : step + 1], own, cache=cache) for one, cache in zip(sides, caches, strict=True)
        )
        np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())
    assert caches[0].lengths.tolist() == [2, 2, 2]
    after = [run(one, ids[:, :1], cache=cache).logits for one, cache in zip(sides, caches, strict=True)]
    np.testing.assert_allclose(*after, atol=1e-5 * np.abs(after[1]).max())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda ids: ids[:, :-1], r"expert ids of shape \[1, 15, 2\] for a step"),
        (lambda ids: ids + EXPERTS, "expert ids from 4"),
        (lambda ids: ids - 2, "expert ids from -2"),
        (lambda ids: None, "no expert ids for a step"),
    ],
)
def test_experts_that_do_not_fit_are_refused_before_a_kernel_sees_them(sides, spoil, message):
    backend, _ = sides
    other = drawn_experts(backend, 1, CHUNK)
    spoilt = spoil(other[1])
    other = {layer: ids for layer, ids in (other | {1: spoilt}).items() if ids is not None}
    with pytest.raises(ArrieroError, match=message) as raised:
        run(backend, drawn_tokens(1, CHUNK), other)
    assert raised.value.where == "layer 1"


def test_with_few_experts_in_memory_those_that_are_forced_are_read(tmp_path, kernels, monkeypatch):
    pytest.importorskip("tvm", reason="needs apache-tvm: pip install 'arriero[tvm]'")
    from arriero.export.compile.tvm import compile_graphs
    from arriero.runtimes.tvm import TvmBackend

    toy, out = lowered(tmp_path, tvm_lowering, make_maverick_toy)
    compile_graphs(out, ["text", "embed"], Device(kernels=kernels))
    spec = model_spec(ModelConfig.load(toy))
    ids = drawn_tokens(1, CHUNK)
    other = {layer: np.arange(CHUNK)[None, :, None] * 8 for layer in range(4) if spec.layers[layer].ffn == "moe"}
    whole = TvmBackend(out, spec, threads=1)
    share = MemoryShare((4,) * len(other), PREFILL_PIECE)
    monkeypatch.setattr("arriero.runtimes.tvm.share_memory", lambda *_: share)
    capped = TvmBackend(out, spec, threads=1, memory=MemoryCap(1 << 30, 64, 1))
    np.testing.assert_array_equal(run(capped, ids, other), run(whole, ids, other))
    assert all(layer.misses >= CHUNK for layer in capped.statistics().layers)


def test_graphs_from_before_take_no_routing_and_run_as_they_did(tmp_path, sides, monkeypatch):
    monkeypatch.setattr(ort_lowering, "add_forced_routing", lambda model, layers, optional: len(layers))
    toy, out = lowered(tmp_path, ort_lowering, make_scout_toy, vision=False, num_experts_per_tok=CHOSEN)
    before = OrtBackend(out, model_spec(ModelConfig.load(toy)), 1)
    assert not forces_routing(before)
    ids = drawn_tokens(1, CHUNK)
    expected = run(sides[1], ids).logits
    np.testing.assert_allclose(run(before, ids).logits, expected, atol=1e-5 * np.abs(expected).max())


def test_the_input_may_be_left_out_and_runtime_and_graph_call_it_the_same(tmp_path):
    assert f"{INPUT}." == PREFIX
    _, out = lowered(tmp_path, ort_lowering, make_maverick_toy)
    graph = ir.load(out / "text.onnx").graph
    names = [str(value.name) for value in graph.inputs if str(value.name).startswith(PREFIX)]
    assert names == [f"{PREFIX}1", f"{PREFIX}3"]  # MoE layers alone
    assert all((graph.initializers[name].const_value.numpy() == -1).all() for name in names)
