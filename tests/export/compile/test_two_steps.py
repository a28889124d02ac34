"""Activations rounded in two steps, in compiled graphs: against the torch reference of the very same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("tvm", reason="needs apache-tvm: pip install 'arriero[tvm]'")

from arriero.export.build_file.model_spec import model_spec
from arriero.export.compile import Device
from arriero.export.compile.tvm import compile_graphs
from arriero.export.proof.reference import TorchBackend
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.config import ModelConfig
from arriero.graphs.lower.part import Lowering
from arriero.graphs.lower.tvm import lower
from arriero.graphs.passes.replace_linear_with_kernel import LINEAR
from arriero.graphs.trace import trace_embed, trace_text
from arriero.profiles.recipe import load_profile
from arriero.profiles.schemes import IntBlock, Scheme
from arriero.profiles.stored_values import stored_values
from arriero.runtimes.tvm import TvmBackend
from tests.toys import make_scout_toy

LENGTH = 13


def schemes_of(checkpoint: Checkpoint, level: int) -> dict[str, Scheme]:
    """Every matrix that all tokens read in int8, the rest exact."""
    assigned = load_profile("int8-all").assign(checkpoint.tensors)
    exact = load_profile("fp32").assign(checkpoint.tensors)
    return {
        name: scheme.model_copy(update={"block": 16, "accuracy_level": level})
        if isinstance(scheme, IntBlock) and ".experts." not in name
        else exact[name]
        for name, scheme in assigned.items()
    }


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy whose matrices are numbers that int8 holds: what is lost is lost by rounding activations."""
    folder = make_scout_toy(tmp_path_factory.mktemp("two") / "toy", 7, vision=False)
    schemes = schemes_of(Checkpoint.open(folder), 4)
    for file in folder.glob("*.safetensors"):
        weights = {name: values.float() for name, values in load_file(file).items()}
        for name, values in weights.items():
            if isinstance(scheme := schemes[f"language_model.{name}"], IntBlock):
                weights[name] = torch.from_numpy(stored_values(values.numpy(), scheme, name=name))
        save_file(weights, file, {"format": "pt"})
    return folder


def error(toy: Path, out: Path, kernels: Path, level: int) -> float:
    """The relative error of the logits of a few tokens, in one step or one by one: the larger."""
    config, checkpoint = ModelConfig.load(toy), Checkpoint.open(toy)
    for part, trace in (("text", trace_text), ("embed", trace_embed)):
        graph = trace(config, checkpoint, out.parent / f"{part}.onnx")
        lower(part, graph, Lowering(config, checkpoint, schemes_of(checkpoint, level), out))
    compile_graphs(out, ["text", "embed"], Device(kernels=kernels))
    backend, reference = TvmBackend(out, model_spec(config), threads=2), TorchBackend(toy, text_only=True)
    given = np.random.default_rng(0).standard_normal((1, LENGTH, backend.spec.hidden_size), np.float32)
    positions = np.arange(LENGTH)[None]
    wanted = reference.forward(given, positions, reference.new_cache(1, LENGTH), np.arange(LENGTH)).logits[0]
    together = backend.forward(given, positions, backend.new_cache(1, LENGTH), np.arange(LENGTH)).logits[0]
    cache, alone = backend.new_cache(1, LENGTH), list[np.ndarray]()
    for at in range(LENGTH):
        token, position = given[:, at : at + 1], positions[:, at : at + 1]
        alone.append(backend.forward(token, position, cache, np.array([0])).logits[0, 0])
    backend.close()
    return max(float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted)) for found in (together, np.stack(alone)))


def test_of_weights_that_int8_holds_two_steps_lose_next_to_nothing(toy: Path, tmp_path: Path, kernels: Path) -> None:
    once, twice = (tmp_path / name / "out" for name in ("once", "twice"))
    for out in (once, twice):
        out.mkdir(parents=True)
    rounded, fine = error(toy, once, kernels, 4), error(toy, twice, kernels, 2)
    assert 1e-3 < rounded < 0.1
    assert fine < rounded / 30


def test_the_graph_says_of_each_matrix_how_often_its_activations_are_rounded(toy: Path, tmp_path: Path) -> None:
    config, checkpoint = ModelConfig.load(toy), Checkpoint.open(toy)
    schemes = schemes_of(checkpoint, 4)
    fine = {name for name in schemes if name.endswith("down_proj.weight")}
    schemes |= {name: schemes[name].model_copy(update={"accuracy_level": 2}) for name in fine}
    graph = trace_text(config, checkpoint, tmp_path / "text.onnx")
    out = tmp_path / "out"
    out.mkdir()
    lower("text", graph, Lowering(config, checkpoint, schemes, out))
    nodes = [node for node in ir.load(out / "text.onnx").graph if node.op_type == LINEAR]
    two_steps = {
        node.inputs[1].name.removesuffix(".packed") for node in nodes if node.attributes["codes"].as_int() == 2
    }
    assert two_steps == fine
    assert len(nodes) > 2 * len(fine)
