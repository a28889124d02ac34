"""The canonical graphs in plain ONNX Runtime, without any kernel of ours, against the torch reference."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file, save_file

from arriero.graphs.check import check
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.config import ModelConfig
from arriero.graphs.model import Llama4, StepTensors
from arriero.graphs.trace import text_signature, trace_embed, trace_text, trace_vision, write_weights
from tests.toys import IMAGE_TOKEN, load_reference, make_guard_toy, make_maverick_toy, make_scout_toy

# Both sides are fp32 and differ only in the order of summation: measured 3e-7 to 6e-7 on these shapes.
TOLERANCE = 5e-6

TOYS = {
    "scout": lambda folder: make_scout_toy(folder, 1),
    "maverick": lambda folder: make_maverick_toy(folder, 2),
    "top-2 and tied": lambda folder: make_scout_toy(
        folder, 3, vision=False, num_experts_per_tok=2, tie_word_embeddings=True
    ),
    "guard": lambda folder: make_guard_toy(folder, 5),
    "all global": lambda folder: make_maverick_toy(folder, 4, layer_types=["full_attention"] * 4),
}


class Traced(NamedTuple):
    folder: Path
    config: ModelConfig
    reference: Llama4
    model: ir.Model
    session: ort.InferenceSession


def relative(found: np.ndarray, wanted: torch.Tensor) -> float:
    reference = wanted.numpy()
    return float(np.linalg.norm(found - reference) / np.linalg.norm(reference))


@pytest.fixture(scope="module", params=list(TOYS))
def traced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Traced:
    folder = tmp_path_factory.mktemp("traced")
    toy = TOYS[request.param](folder / "toy")
    config = ModelConfig.load(toy)
    model = trace_text(config, Checkpoint.open(toy), folder / "text.onnx")
    return Traced(folder, config, load_reference(toy), model, opened(model, toy, folder / "text.onnx"))


def opened(model: ir.Model, toy: Path, path: Path) -> ort.InferenceSession:
    """The traced graph in a plain runtime, its weights put where it names them."""
    write_weights(model, Checkpoint.open(toy), path.parent)
    return ort.InferenceSession(path)


def both(traced: Traced, batch: int, new: int, past: int, chunk_past: int) -> tuple[dict[str, np.ndarray], StepTensors]:
    """One step of `new` tokens after `past`, of which chunked layers hold `chunk_past`: ours and the reference."""
    text, draw = traced.config.text, torch.Generator().manual_seed(new + past)
    embeds = torch.randn(batch, new, text.hidden_size, generator=draw)
    positions = torch.arange(past, past + new).expand(batch, new).clone()
    in_chunk = torch.arange(past - chunk_past, past).expand(batch, chunk_past).clone()
    in_global = torch.arange(past).expand(batch, past).clone()
    if batch > 1 and chunk_past > 4:
        in_chunk[0, 1:3] = -1  # empty slots
        in_global[1, :2] = -1
    cache = [
        tuple(
            torch.randn(batch, text.kv_heads, chunk_past if layer.chunked else past, text.head_dim, generator=draw)
            for _ in range(2)
        )
        for layer in text.layers
    ]
    index = torch.tensor([0, new - 1])
    expected = traced.reference.language_model(embeds, positions, in_chunk, in_global, index, cache)
    values = [embeds, positions, in_chunk, in_global, index, *(tensor for pair in cache for tensor in pair)]
    inputs, outputs = text_signature(traced.config)
    feeds = {name: value.numpy() for name, value in zip(inputs, values, strict=True)}
    return dict(zip(outputs, traced.session.run(outputs, feeds), strict=True)), expected


@pytest.mark.parametrize(
    ("batch", "new", "past", "chunk_past"),
    [
        (1, 1, 0, 0),
        (2, 5, 0, 0),  # within the first chunk of 16
        (2, 40, 0, 0),  # over three chunks in one step
        (1, 3, 20, 20),  # past beyond the chunk, all of it kept
        (3, 7, 50, 16),  # chunked layers keep less than global ones; some slots empty
        (1, 1, 130, 3),
    ],
)
def test_text_graph_matches_the_reference(traced: Traced, batch: int, new: int, past: int, chunk_past: int) -> None:
    ours, expected = both(traced, batch, new, past, chunk_past)
    assert relative(ours["logits"], expected.logits) < TOLERANCE
    for index, (key, value) in enumerate(expected.present):
        assert relative(ours[f"present_key.{index}"], key) < TOLERANCE
        assert relative(ours[f"present_value.{index}"], value) < TOLERANCE
        assert relative(ours[f"hidden.{index}"], expected.hiddens[index]) < TOLERANCE
    for index, expert_id in zip(traced.config.text.moe_layers, expected.expert_ids, strict=True):
        assert np.array_equal(np.sort(ours[f"expert_id.{index}"]), np.sort(expert_id.numpy()))


def test_text_graph_keeps_its_promises(traced: Traced) -> None:
    check("text", traced.model, traced.config)
    check("text", ir.load(traced.folder / "text.onnx"), traced.config)
    proto = onnx.load(traced.folder / "text.onnx", load_external_data=False)
    onnx.checker.check_model(traced.folder / "text.onnx")
    assert {opset.domain: opset.version for opset in proto.opset_import} == {"": 23, "ai.arriero": 1}
    assert (traced.folder / "text.onnx").stat().st_size < 200_000


def test_weights_are_names_and_nothing_of_where_they_are_stored(tmp_path: Path) -> None:
    """Two checkpoints of one content, in one file and in shards of other names, trace to the same bytes."""
    toy = make_maverick_toy(tmp_path / "toy", 2)
    config, tensors = ModelConfig.load(toy), load_file(toy / "model.safetensors")
    shards = tmp_path / "shards"
    shutil.copytree(toy, shards, ignore=shutil.ignore_patterns("*.safetensors"))
    halves = {"a.safetensors": list(tensors)[::2], "b.safetensors": list(tensors)[1::2]}
    for file, names in halves.items():
        save_file({name: tensors[name] for name in names}, shards / file)
    index = {"weight_map": {name: file for file, names in halves.items() for name in names}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    for folder in (toy, shards):
        trace_text(config, Checkpoint.open(folder), folder / "graph" / "text.onnx")
    assert [path.name for path in (toy / "graph").iterdir()] == ["text.onnx"]
    assert (toy / "graph" / "text.onnx").read_bytes() == (shards / "graph" / "text.onnx").read_bytes()
    model = ir.load(toy / "graph" / "text.onnx")
    for name, value in model.graph.initializers.items():
        if name in Checkpoint.open(toy).tensors:  # the others are constants of a few bytes
            assert isinstance(value.const_value, ir.ExternalTensor)
            assert (value.const_value.location, value.const_value.offset) == (name, 0)


@pytest.mark.parametrize("tiles", [1, 2, 5])
def test_vision_graph_matches_the_reference(tmp_path: Path, tiles: int) -> None:
    toy = make_scout_toy(tmp_path / "toy", 5)
    config = ModelConfig.load(toy)
    model = trace_vision(config, Checkpoint.open(toy), tmp_path / "vision.onnx")
    check("vision", model, config)
    pixels = torch.randn(tiles, 3, 32, 32, generator=torch.Generator().manual_seed(tiles))
    (ours,) = opened(model, toy, tmp_path / "vision.onnx").run(None, {"pixel_values": pixels.numpy()})
    assert relative(ours, load_reference(toy).image_features(pixels)) < TOLERANCE


@pytest.mark.parametrize("vision", [True, False])
def test_embed_graph_matches_the_reference_exactly(tmp_path: Path, vision: bool) -> None:
    toy = make_scout_toy(tmp_path / "toy", 6, vision=vision)
    config = ModelConfig.load(toy)
    model = trace_embed(config, Checkpoint.open(toy), tmp_path / "embed.onnx")
    check("embed", model, config)
    session, reference = opened(model, toy, tmp_path / "embed.onnx"), load_reference(toy)
    ids = torch.randint(0, IMAGE_TOKEN, (2, 9), generator=torch.Generator().manual_seed(0))
    none, some = torch.zeros(0, 64), torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    images = ids.clone()
    images[0, 2:5] = images[1, 7:] = IMAGE_TOKEN
    for input_ids, features in ((ids, none), (images, some), (ids[:1, :1], none)):
        (ours,) = session.run(None, {"input_ids": input_ids.numpy(), "image_features": features.numpy()})
        np.testing.assert_array_equal(ours, reference.embed(input_ids, features).numpy())


def test_a_float32_checkpoint_traces_as_well(tmp_path: Path) -> None:
    toy = make_maverick_toy(tmp_path / "toy", 7)
    file = toy / "model.safetensors"
    wide = {name: tensor.float() for name, tensor in load_file(file).items()}
    file.unlink()
    save_file(wide, file)
    config = ModelConfig.load(toy)
    model = trace_text(config, Checkpoint.open(toy), tmp_path / "text.onnx")
    check("text", model, config)
    session = opened(model, toy, tmp_path / "text.onnx")
    ours, expected = both(Traced(tmp_path, config, load_reference(toy), model, session), 1, 20, 0, 0)
    assert relative(ours["logits"], expected.logits) < TOLERANCE


def test_angles_are_tables_in_float32_for_each_digit_of_a_position(tmp_path):
    """No operator in float64, which engines for GPUs lack, and no sine of an angle that float32 has rounded."""
    toy = make_scout_toy(tmp_path / "toy", 1, vision=False, head_dim=128, max_position_embeddings=10_485_760)
    model = trace_text(ModelConfig.load(toy), Checkpoint.open(toy), tmp_path / "text.onnx")
    values = [value for node in model.graph for value in (*node.inputs, *node.outputs) if value is not None]
    assert ir.DataType.DOUBLE not in {value.dtype for value in values}
    assert not {"Cos", "Sin", "Range"} & {node.op_type for node in model.graph}
    tables = [node.inputs[0] for node in model.graph if node.op_type == "Gather" and len(node.outputs[0].shape) == 3]
    constants = [tuple(table.shape) for table in tables if table.const_value is not None]
    # cosine and sine, each for three digits: 256 ** 3 is the first power above the length
    assert constants == [(256, 64)] * 6
