"""Elementwise functions whose rows threads share: which, for which steps, and that no bit depends on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm", reason="needs apache-tvm: pip install 'arriero[tvm]'")

import tvm
from tvm import relax

from arriero.export.build_file.model_spec import model_spec
from arriero.export.compile import Device
from arriero.export.compile.cpus import NATIVE, parse_cpu
from arriero.export.compile.relax import ops
from arriero.export.compile.relax.import_graph import import_graph
from arriero.export.compile.relax.share_rows import calls_threads
from arriero.export.compile.tvm import compile_graphs, fuse, llvm_target
from arriero.graphs.config import ModelConfig
from arriero.runtimes.tvm import TvmBackend
from tests.export.compile.test_compile_tvm import called, lower
from tests.toys import make_scout_toy

LONG = 64  # tokens: what depends on positions takes many values, and is rounded in many ways
WIDTHS = {"hidden_size": 128, "intermediate_size": 192, "intermediate_size_mlp": 192, "attention_chunk_size": LONG}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scout_toy(tmp_path_factory.mktemp("rows") / "toy", 4, vision=False, **WIDTHS)


def test_prompts_share_the_rows_of_norms_gates_sums_and_rotary(toy: Path, tmp_path: Path) -> None:
    lower(toy, tmp_path / "out")
    module = fuse(import_graph(tmp_path / "out" / "text.onnx").module)
    step, prompt = called(module, "step"), called(module, "prompt")
    assert not [name for name in step if name.endswith("_rows")]
    assert [name.removesuffix("_rows") for name in prompt] == step
    shared = {name for name in prompt if name.endswith("_rows")}
    for part in ("rms_norm", "sigmoid", "multiply", "add", "mean", "rotary"):
        assert any(part in name for name in shared), part
    assert [calls_threads(module, entry) for entry in ("step", "token", "prompt", "main")] == [False, False, True, True]
    assert called(module, "token") == step
    assert all("_rf" in module[name].script() for name in shared if "rms_norm" in name)  # sums in lanes
    alone = {name for name in prompt if name not in shared}
    assert not [name for name in alone if "rms_norm" in name or "sigmoid1_" in name]
    assert not [name for name in shared if "reshape" in name]  # which would be copied, where it is only looked at anew


@pytest.mark.parametrize(("threads", "size"), [(2, 16), (3, 128)])
def test_a_prompt_has_the_bits_of_steps_whose_rows_are_not_shared(
    tmp_path: Path, kernels: Path, threads: int, size: int
) -> None:
    toy = make_scout_toy(tmp_path / "toy", 4, vision=False, **WIDTHS, head_dim=size)
    lower(toy, tmp_path / "out")
    compile_graphs(tmp_path / "out", ["text", "embed"], Device(kernels=kernels))
    backend = TvmBackend(tmp_path / "out", model_spec(ModelConfig.load(toy)), threads)
    hidden = np.random.default_rng(threads).standard_normal((1, LONG, backend.spec.hidden_size), np.float32)
    positions, index = np.arange(LONG)[None], np.arange(LONG)
    taken: list[str] = []
    graph = backend._graphs["text"]
    run = graph.run

    def note(feeds: dict[str, np.ndarray], function: str = "main") -> list[np.ndarray]:
        taken.append(function)
        return run(feeds, function)

    graph.run = note  # type: ignore[method-assign]
    many = backend.forward(hidden, positions, backend.new_cache(1, LONG), index).logits
    graph.many = LONG + 1
    few = backend.forward(hidden, positions, backend.new_cache(1, LONG), index).logits
    assert taken == ["prompt", "step"]
    np.testing.assert_array_equal(many, few)


def computed(compute: Callable[[Any], Any], x: np.ndarray) -> np.ndarray:
    """What a tensor expression makes of `x`, compiled for this processor."""
    builder = relax.BlockBuilder()
    value = relax.Var("x", relax.TensorType(x.shape, "float32"))
    with builder.function("main", [value]):
        builder.emit_func_output(builder.emit_te(compute, value))
    library = relax.build(builder.get(), llvm_target(parse_cpu(NATIVE)))
    found: np.ndarray = relax.VirtualMachine(library, tvm.cpu())["main"](tvm.runtime.tensor(x)).numpy()
    return found


def test_a_sigmoid_is_exact_to_a_few_parts_of_ten_million_and_keeps_nan() -> None:
    x = np.float32([-np.inf, -200, -87.5, -1e-30, 0, 1e-30, 88.5, 300, np.inf, np.nan])
    x = np.concatenate([x, np.linspace(-87, 87, 100_001, dtype=np.float32)])
    found = computed(ops.sigmoid, x)
    with np.errstate(over="ignore"):
        right = 1 / (1 + np.exp(-x.astype(np.float64)))
    assert np.isnan(found[9])
    ordinary = np.abs(x) <= 87
    np.testing.assert_allclose(found[ordinary], right[ordinary], rtol=3e-7)
    np.testing.assert_allclose(found[[0, 1, 2, 6, 7, 8]], right[[0, 1, 2, 6, 7, 8]], atol=1e-37)


def test_gelu_is_exact_to_a_few_parts_of_ten_million_and_keeps_nan() -> None:
    x = np.concatenate(
        [np.float32([0, 1e-30, -1e-30, 100, -100, np.nan]), np.linspace(-9, 9, 100_001, dtype=np.float32)]
    )
    found = computed(ops.gelu, x)
    right = np.array([value * (1 + math.erf(value / math.sqrt(2))) / 2 for value in x.astype(np.float64)])
    assert np.isnan(found[5])
    np.testing.assert_allclose(np.delete(found, 5), np.delete(right, 5), rtol=3e-7, atol=3e-7)
