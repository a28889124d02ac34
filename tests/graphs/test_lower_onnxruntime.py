"""The lowered graphs, stepped as the runtime steps them, against the torch reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from safetensors import safe_open

from arriero.errors import ArrieroError
from arriero.export.compile import Device
from arriero.export.compile.onnxruntime import compile_graphs
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.config import ModelConfig
from arriero.graphs.lower.onnxruntime import lower
from arriero.graphs.lower.part import Lowering
from arriero.graphs.model import Llama4, StepTensors
from arriero.graphs.trace import trace_embed, trace_text, trace_vision
from arriero.profiles.quantize import dequantize, quantize
from arriero.profiles.recipe import Profile, load_profile
from arriero.profiles.schemes import IntBlock, Scheme
from arriero.runtimes.onnxruntime import session_options
from tests.toys import IMAGE_TOKEN, load_reference, make_guard_toy, make_maverick_toy, make_scout_toy

# fp32 on both sides, another order of summation: measured 4e-7 to 6e-7.
TOLERANCE = 5e-6
# int8 kernels round activations to int8 per block as well: each product is off by about 1 %, and the errors of four
# layers add up. Measured 1.4e-2 on every toy for the tokens whose routing agrees.
INT8_TOLERANCE = 3e-2
LENGTH, CAPACITY = 50, 64
CUTS = [0, 9, 16, 17, 18, 32, 37, 48, 49, 50]  # no step crosses a chunk of 16

TOYS = {
    "scout": lambda folder: make_scout_toy(folder, 1),
    "maverick": lambda folder: make_maverick_toy(folder, 2),
    "top-2 and tied": lambda folder: make_scout_toy(
        folder, 3, vision=False, num_experts_per_tok=2, tie_word_embeddings=True
    ),
    "guard": lambda folder: make_guard_toy(folder, 6),
}


class Stepper:
    """Drives a lowered text graph with numpy buffers, as a runtime must: in place, chunked caches restarted."""

    def __init__(self, path: Path, config: ModelConfig, batch: int) -> None:
        self.session, self.text = ort.InferenceSession(path, session_options(1)), config.text
        self.names = [output.name for output in self.session.get_outputs()]
        self.lengths = np.zeros(batch, np.int64)
        self.cache = {}
        for index, layer in enumerate(self.text.layers):
            shape = (batch, self.text.kv_heads, self.text.chunk if layer.chunked else CAPACITY, self.text.head_dim)
            for kind in ("key", "value"):
                self.cache[f"{kind}.{index}"] = self.unwritten(f"past_{kind}.{index}", shape)

    def unwritten(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A buffer full of what would be noticed: an unwritten slot must not matter."""
        kind = {value.name: value.type for value in self.session.get_inputs()}[name]
        return np.full(shape, 99, np.int8) if kind == "tensor(int8)" else np.full(shape, np.nan, np.float32)

    def step(self, embeds: np.ndarray) -> dict[str, np.ndarray]:
        batch, new, _ = embeds.shape
        positions = self.lengths[:, None] + np.arange(new)
        after = self.lengths + new
        chunk = self.text.chunk
        assert new == 1 or (batch == 1 and self.lengths[0] // chunk == (after[0] - 1) // chunk)
        feeds = {"inputs_embeds": embeds, "positions": positions, "logits_index": np.arange(new)}
        for kind, valid in (("chunk", (after - 1) % chunk + 1), ("global", after)):
            feeds[f"{kind}_seqlens_k"] = (valid - 1).astype(np.int32)
            feeds[f"{kind}_total"] = np.array([valid.max()], np.int32)
        binding = self.session.io_binding()
        for name, value in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for name, buffer in self.cache.items():
            binding.bind_input(f"past_{name}", "cpu", 0, buffer.dtype.type, buffer.shape, buffer.ctypes.data)
        for name in self.names:
            if name.startswith("present_"):
                buffer = self.cache[name.removeprefix("present_")]
                binding.bind_output(name, "cpu", 0, buffer.dtype.type, buffer.shape, buffer.ctypes.data)
            else:
                binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        self.lengths = after
        return dict(zip(self.names, binding.copy_outputs_to_cpu(), strict=True))


class Built:
    """A toy, its reference and its canonical text graph; `lower` gives the folder of one lowering."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, toy = folder, TOYS[name](folder / "toy")
        self.config, self.checkpoint = ModelConfig.load(toy), Checkpoint.open(toy)
        self.reference = load_reference(toy)
        self.canonical = trace_text(self.config, self.checkpoint, folder / "graph" / "text.onnx")
        self.tables: dict[str, dict[str, dict[str, Any]]] = {}

    def lower(self, profile: Profile) -> Path:
        out = self.folder / profile.name
        if not out.exists():
            out.mkdir()
            schemes = profile.assign(self.checkpoint.tensors)
            self.tables[profile.name] = lower(
                "text", self.canonical, Lowering(self.config, self.checkpoint, schemes, out)
            )
        return out

    def embeds(self, batch: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(batch)
        return torch.randn(batch, LENGTH, self.config.text.hidden_size, generator=draw)


@pytest.fixture(scope="module", params=list(TOYS))
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("lowered"), request.param)


def whole(reference: Llama4, embeds: torch.Tensor) -> StepTensors:
    """The reference over the whole sequence at once."""
    batch = len(embeds)
    positions, none = torch.arange(LENGTH).expand(batch, LENGTH), torch.zeros(batch, 0, dtype=torch.int64)
    model = reference.language_model
    return model(embeds, positions, none, none, torch.arange(LENGTH), model.empty_cache(batch))


def stepped(stepper: Stepper, embeds: np.ndarray, cuts: list[int]) -> dict[str, np.ndarray]:
    """Logits, hidden states and expert ids of the steps between `cuts`, joined along the sequence."""
    steps = [stepper.step(embeds[:, start:stop]) for start, stop in pairwise(cuts)]
    kept = [name for name in stepper.names if not name.startswith("present_")]
    batch = len(embeds)
    return {
        name: np.concatenate([step[name].reshape(batch, -1, step[name].shape[-1]) for step in steps], 1)
        for name in kept
    }


def relative(found: np.ndarray, wanted: torch.Tensor) -> float:
    reference = wanted.numpy()
    return float(np.linalg.norm(found - reference) / np.linalg.norm(reference))


def rounded(reference: Llama4, schemes: Mapping[str, Scheme], folder: Path) -> Llama4:
    """The reference with every quantised weight replaced by what its integers stand for."""
    model = Llama4(reference.config).requires_grad_(False).eval()
    wide = {name: tensor.float() for name, tensor in reference.state_dict().items()}
    for name, scheme in schemes.items():
        if not isinstance(scheme, IntBlock):
            continue
        experts = wide[name].ndim == 3  # stored [E, in, out]; blocks run along the inputs
        rows = (wide[name].mT if experts else wide[name]).contiguous().numpy()
        back = torch.from_numpy(dequantize(quantize(rows, bits=scheme.bits, block=scheme.block, name=name)))
        wide[name] = back.mT if experts else back
    model.load_state_dict(wide, assign=True)
    return model


def exact_integers(bits: int) -> Profile:
    """The int8 profile with other bits and activations left in fp32, so that rounding of weights is all there is."""
    data = load_profile("int8").model_dump()
    scheme = {"kind": "int_block", "bits": bits, "block": 32, "accuracy_level": 0}
    return Profile.model_validate(
        {**data, "name": f"int{bits}-exact", "rules": [{**rule, "scheme": scheme} for rule in data["rules"]]}
    )


def test_fp32_prefill_and_decode_over_chunks_match_the_reference(built: Built) -> None:
    embeds = built.embeds(1)
    ours = stepped(Stepper(built.lower(load_profile("fp32")) / "text.onnx", built.config, 1), embeds.numpy(), CUTS)
    expected = whole(built.reference, embeds)
    assert relative(ours["logits"], expected.logits) < TOLERANCE
    assert np.abs(ours["logits"] - expected.logits.numpy()).max() < 1e-4
    for index, hidden in enumerate(expected.hiddens):
        assert relative(ours[f"hidden.{index}"], hidden) < TOLERANCE
    for index, ids in zip(built.config.text.moe_layers, expected.expert_ids, strict=True):
        assert np.array_equal(np.sort(ours[f"expert_id.{index}"][0]), np.sort(ids.numpy()))


def test_rows_of_a_batch_decode_apart_at_different_lengths(built: Built) -> None:
    embeds = built.embeds(3)
    expected = whole(built.reference, embeds).logits
    stepper = Stepper(built.lower(load_profile("fp32")) / "text.onnx", built.config, 3)
    single = Stepper(built.lower(load_profile("fp32")) / "text.onnx", built.config, 1)
    starts = [3, 16, 31]
    for row, start in enumerate(starts):  # prefill one by one, then put the rows together
        single.lengths[:] = 0
        for begin, end in pairwise(sorted({0, *(cut for cut in CUTS if cut < start), start})):
            single.step(embeds[row : row + 1, begin:end].numpy())
        for name, buffer in single.cache.items():
            stepper.cache[name][row] = buffer[0]
    stepper.lengths[:] = starts
    for turn in range(18):  # each row crosses a chunk boundary at another turn
        tokens = np.stack([embeds[row, start + turn].numpy() for row, start in enumerate(starts)])[:, None]
        logits = stepper.step(tokens)["logits"]
        wanted = torch.stack([expected[row, start + turn] for row, start in enumerate(starts)])
        assert relative(logits[:, 0], wanted) < TOLERANCE


def test_integer_kernels_compute_exactly_what_the_integers_stand_for(built: Built, tmp_path: Path) -> None:
    profile = exact_integers(4)
    schemes = profile.assign(built.checkpoint.tensors)
    embeds = built.embeds(1)
    ours = stepped(Stepper(built.lower(profile) / "text.onnx", built.config, 1), embeds.numpy(), CUTS)
    expected = whole(rounded(built.reference, schemes, tmp_path), embeds)
    assert relative(ours["logits"], expected.logits) < TOLERANCE


def test_int8_differs_by_the_rounding_of_activations_only(built: Built, tmp_path: Path) -> None:
    profile = load_profile("int8")
    schemes = profile.assign(built.checkpoint.tensors)
    embeds = built.embeds(1)
    ours = stepped(Stepper(built.lower(profile) / "text.onnx", built.config, 1), embeds.numpy(), CUTS)
    expected = whole(rounded(built.reference, schemes, tmp_path), embeds)
    moe = built.config.text.moe_layers
    same = np.stack(
        [
            np.full(LENGTH, True),  # a model without experts routes nothing
            *(
                (np.sort(ours[f"expert_id.{index}"][0]) == np.sort(ids.numpy())).all(-1)
                for index, ids in zip(moe, expected.expert_ids, strict=True)
            ),
        ]
    ).all(0)
    assert same.mean() > 0.8  # random routers have near-ties; a flip there is no fault of the graph
    assert relative(ours["logits"][0, same], expected.logits[0, torch.from_numpy(same)]) < INT8_TOLERANCE


def test_int8_nodes_carry_what_their_kernels_need(built: Built) -> None:
    model = ir.load(built.lower(load_profile("int8")) / "text.onnx")
    nodes, moe = list(model.graph), built.config.text.moe_layers
    assert {node.domain for node in nodes} == {"", "com.microsoft", *(["ai.arriero"] if moe else [])}
    assert [name for _, name, _ in model.functions] == (["RouteTokens"] if moe else [])
    linear = [node for node in nodes if node.op_type == "MatMulNBits"]
    assert linear
    assert all(node.attributes["accuracy_level"].as_int() == 4 for node in linear)
    experts = [node for node in nodes if node.op_type == "QMoE"]
    assert len(experts) == len(moe)
    for node in experts:
        found = {name: attribute.value for name, attribute in node.attributes.items()}
        wanted = {"k": 1, "swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0, "block_size": 32}
        assert {name: found[name] for name in wanted} == wanted
    names = [value.name for value in model.graph.inputs]
    assert names[:3] == ["inputs_embeds", "positions", "logits_index"]
    counters = ["chunk_seqlens_k", "chunk_total", "global_seqlens_k", "global_total"]
    wanted = [*counters, *(f"forced_expert_id.{layer}" for layer in moe)]
    assert names[-len(wanted) :] == wanted


@pytest.mark.parametrize("name", ["fp32", "int8"])
def test_the_weight_table_describes_the_file(built: Built, name: str) -> None:
    out = built.lower(load_profile(name))
    table = built.tables[name]
    assert {file for entry in table.values() for file in entry["files"]} == {"weights/text-00001.safetensors"}
    with safe_open(out / "weights" / "text-00001.safetensors", "np") as file:
        assert set(file.keys()) == set(table)
        for tensor, entry in table.items():
            assert file.get_slice(tensor).get_shape() == entry["shape"]
            assert file.get_slice(tensor).get_dtype() == entry["dtype"]
    schemes = {entry["scheme"] for entry in table.values()}
    assert schemes == ({"exact"} if name == "fp32" else {"exact", "int8 block 32"})
    assert (out / "text.onnx").stat().st_size < 200_000


def test_vision_and_embed_match_the_reference(tmp_path: Path) -> None:
    toy = make_scout_toy(tmp_path / "toy", 4)
    config, checkpoint, reference = ModelConfig.load(toy), Checkpoint.open(toy), load_reference(toy)
    schemes = load_profile("int8").assign(checkpoint.tensors)
    out = tmp_path / "out"
    out.mkdir()
    vision = lower(
        "vision", trace_vision(config, checkpoint, tmp_path / "vision.onnx"), Lowering(config, checkpoint, schemes, out)
    )
    embed = lower(
        "embed", trace_embed(config, checkpoint, tmp_path / "embed.onnx"), Lowering(config, checkpoint, schemes, out)
    )
    assert all(entry["dtype"] == "F32" for entry in vision.values())
    assert [entry["dtype"] for entry in embed.values()] == ["BF16"]  # the table is not doubled
    assert compile_graphs(out, ["vision", "embed"], Device()).tools == {"onnxruntime": ort.__version__}
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = reference.image_features(pixels)
    (ours,) = ort.InferenceSession(out / "vision.onnx").run(None, {"pixel_values": pixels.numpy()})
    assert relative(ours, features) < TOLERANCE
    ids = torch.randint(0, IMAGE_TOKEN, (2, 9), generator=torch.Generator().manual_seed(0))
    ids[1, 2:6] = IMAGE_TOKEN
    (ours,) = ort.InferenceSession(out / "embed.onnx").run(
        None, {"input_ids": ids.numpy(), "image_features": features.numpy()}
    )
    np.testing.assert_array_equal(ours, reference.embed(ids, features).numpy())


def altered(built: Built, name: str, scheme: Scheme) -> dict[str, Scheme]:
    return {**load_profile("fp32").assign(built.checkpoint.tensors), name: scheme}


def refusals() -> Iterator[Any]:
    eight = IntBlock(kind="int_block", bits=8, block=32, accuracy_level=4)
    layer = "language_model.model.layers.1"
    yield pytest.param(f"{layer}.input_layernorm.weight", eight, "no kernel of the backend reads it so", id="norm")
    yield pytest.param(f"{layer}.feed_forward.experts.down_proj", eight, "no single kernel takes", id="half a layer")
    wide = IntBlock(kind="int_block", bits=8, block=128, accuracy_level=4)
    yield pytest.param(f"{layer}.self_attn.q_proj.weight", wide, "do not divide into blocks of 128", id="block")


@pytest.mark.parametrize(("name", "scheme", "words"), list(refusals()))
def test_a_scheme_without_a_kernel_is_refused_by_name(
    built: Built, tmp_path: Path, name: str, scheme: Scheme, words: str
) -> None:
    if name not in built.checkpoint.tensors:
        pytest.skip("needs a model with experts")
    with pytest.raises(ArrieroError, match=words) as caught:
        lower("text", built.canonical, Lowering(built.config, built.checkpoint, altered(built, name, scheme), tmp_path))
    assert name in str(caught.value)
    assert not list(tmp_path.rglob("*.onnx"))


def test_a_graph_that_does_not_load_is_refused_by_name(built: Built, tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_bytes((built.lower(load_profile("fp32")) / "text.onnx").read_bytes())
    with pytest.raises(ArrieroError, match=r"text\.onnx: ONNX Runtime"):
        compile_graphs(tmp_path, ["text"], Device())


def test_lowering_leaves_the_canonical_graph_alone(built: Built) -> None:
    before = sorted(node.op_type for node in built.canonical.graph)
    built.lower(exact_integers(4))
    assert sorted(node.op_type for node in built.canonical.graph) == before
    assert "chunk_past_positions" in [value.name for value in built.canonical.graph.inputs]


def test_rotations_become_one_node_each(built: Built) -> None:
    nodes = [node.op_type for node in ir.load(built.lower(load_profile("fp32")) / "text.onnx").graph]
    assert nodes.count("RotaryEmbedding") == 2 * sum(layer.rope for layer in built.config.text.layers)
    assert "Transpose" not in nodes  # no weight is transposed at run time


def test_a_tied_head_does_not_take_the_embedding_tables_name(built: Built) -> None:
    built.lower(load_profile("fp32"))
    assert "language_model.lm_head.weight" in built.tables["fp32"]
    assert "language_model.model.embed_tokens.weight" not in built.tables["fp32"]
