"""The graphs lowered for TensorRT: standard operators alone, run by ONNX Runtime against the torch reference."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from arriero.errors import ArrieroError
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.config import ModelConfig
from arriero.graphs.lower.part import Lowering
from arriero.graphs.lower.tensorrt import activations
from arriero.graphs.lower.tensorrt_rtx import lacks, lower
from arriero.graphs.passes.tile_experts import tile_rows
from arriero.graphs.stored.weight_store import narrow
from arriero.graphs.trace import trace_embed, trace_vision
from arriero.profiles.groups import is_layer_matrix
from arriero.profiles.quantized_weights import QuantizedWeights
from arriero.profiles.recipe import load_profile
from arriero.profiles.schemes import Exact, Fp8, Fp8Static, Half, Int8Dynamic, Int8Static, IntBlock, Scheme
from arriero.runtimes.onnxruntime import session_options
from tests.graphs.test_lower_eight_bits import OTHER_WAY, round_inputs, rounding
from tests.graphs.test_lower_onnxruntime import (
    CAPACITY,
    CUTS,
    LENGTH,
    TOYS,
    Built,
    Stepper,
    relative,
    rounded,
    stepped,
    whole,
)
from tests.toys import IMAGE_TOKEN, load_reference, make_scout_toy

# fp32 on both sides, another order of summation: measured 4e-7 to 7e-7.
TOLERANCE = 5e-6
# Products in float16: 2^-11 each, through four layers. Measured 4e-4 to 7e-4 for the tokens whose routing agrees.
HALF_TOLERANCE = 3e-3
STALE = 3.0  # what lies in a slot that no token of the row is in: finite, and large enough to be noticed
INT4 = IntBlock(kind="int_block", bits=4, block=32, accuracy_level=0)
HALF = Half(kind="half", format="float16")
STATIC: dict[str, Scheme] = {
    "int8 smooth": Int8Static(kind="int8_static", smooth=0.5),
    "int8 rtn": Int8Static(kind="int8_static").rtn_baseline(),
    "fp8": Fp8Static(kind="fp8_static"),
}


class InPlace(Stepper):
    """Steps a graph whose cache outputs lie in the memory of its inputs, as the engines' runtime binds them."""

    def __init__(self, path: Path, config: ModelConfig, batch: int) -> None:
        self.session, self.text = ort.InferenceSession(path, session_options(1, literal=True)), config.text
        self.names = [output.name for output in self.session.get_outputs()]
        self.lengths = np.zeros(batch, np.int64)
        kinds = {value.name: value.type for value in self.session.get_inputs()}
        self.cache = {}
        for index, layer in enumerate(self.text.layers):
            shape = (batch, self.text.kv_heads, self.text.chunk if layer.chunked else CAPACITY, self.text.head_dim)
            for kind in ("key", "value"):
                dtype = np.float16 if "float16" in kinds[f"past_{kind}.{index}"] else np.float32
                self.cache[f"{kind}.{index}"] = np.full(shape, STALE, dtype)

    def step(self, embeds: np.ndarray) -> dict[str, np.ndarray]:
        _, new, _ = embeds.shape
        feeds = {"inputs_embeds": embeds, "positions": self.lengths[:, None] + np.arange(new)}
        binding = self.session.io_binding()
        for name, value in {**feeds, "logits_index": np.arange(new)}.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for name, buffer in self.cache.items():
            binding.bind_input(f"past_{name}", "cpu", 0, buffer.dtype.type, buffer.shape, buffer.ctypes.data)
            binding.bind_output(f"present_{name}", "cpu", 0, buffer.dtype.type, buffer.shape, buffer.ctypes.data)
        found = [name for name in self.names if not name.startswith("present_")]
        for name in found:
            binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        self.lengths = self.lengths + new
        # outputs come in the order they were bound in
        return dict(zip(found, (value.numpy() for value in binding.get_outputs()[len(self.cache) :]), strict=True))


@pytest.fixture(scope="session", params=list(TOYS))
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("lowered"), request.param)


def assign(built: Built, scheme: Scheme, rest: Scheme | None = None) -> dict[str, Scheme]:
    """`scheme` for the decoder layers' matrices and `rest` for what else may be narrow; router and norms exact."""
    names = built.checkpoint.tensors
    kept = {name for name in names if "router" in name or "norm" in name}
    other = {name: Exact() if name in kept or rest is None else rest for name in names}
    return {name: scheme if is_layer_matrix(name) else other[name] for name in names}


def text(built: Built, schemes: dict[str, Scheme], out: Path, roundings: QuantizedWeights | None = None) -> InPlace:
    lower("text", built.canonical, Lowering(built.config, built.checkpoint, schemes, out, roundings=roundings))
    return InPlace(out / "text.onnx", built.config, 1)


def same_routes(built: Built, ours: dict[str, np.ndarray], expert_ids: list[torch.Tensor]) -> np.ndarray:
    """Which tokens every MoE layer sends to the same experts on both sides."""
    pairs = zip(built.config.text.moe_layers, expert_ids, strict=True)
    found = [(np.sort(ours[f"expert_id.{at}"][0]) == np.sort(ids.numpy())).all(-1) for at, ids in pairs]
    return np.stack([np.full(LENGTH, True), *found]).all(0)


def test_fp32_prefill_and_decode_over_chunks_match_the_reference(built: Built, tmp_path: Path) -> None:
    embeds = built.embeds(1)
    ours = stepped(text(built, assign(built, Exact()), tmp_path), embeds.numpy(), CUTS)
    expected = whole(built.reference, embeds)
    assert relative(ours["logits"], expected.logits) < TOLERANCE
    for index, hidden in enumerate(expected.hiddens):
        assert relative(ours[f"hidden.{index}"], hidden) < TOLERANCE
    assert same_routes(built, ours, expected.expert_ids).all()


def test_rows_of_a_batch_decode_apart_at_different_lengths(built: Built, tmp_path: Path) -> None:
    embeds = built.embeds(3)
    expected = whole(built.reference, embeds).logits
    single = text(built, assign(built, Exact()), tmp_path)
    together = InPlace(tmp_path / "text.onnx", built.config, 3)
    starts = [3, 16, 31]
    for row, start in enumerate(starts):
        single.lengths[:] = 0
        cuts = sorted({0, *(cut for cut in CUTS if cut < start), start})
        stepped(single, embeds[row : row + 1].numpy(), cuts)
        for name, buffer in single.cache.items():
            together.cache[name][row] = buffer[0]
    together.lengths[:] = starts
    for turn in range(18):  # each row crosses a chunk boundary at another turn
        tokens = np.stack([embeds[row, start + turn].numpy() for row, start in enumerate(starts)])[:, None]
        wanted = torch.stack([expected[row, start + turn] for row, start in enumerate(starts)])
        assert relative(together.step(tokens)["logits"][:, 0], wanted) < TOLERANCE


def test_float16_rounds_products_and_attention_and_nothing_else(built: Built, tmp_path: Path) -> None:
    embeds = built.embeds(1)
    schemes = assign(built, HALF, HALF)
    ours = stepped(text(built, schemes, tmp_path), embeds.numpy(), CUTS)
    expected = whole(built.reference, embeds)
    same = same_routes(built, ours, expected.expert_ids)
    assert same.mean() > 0.9
    error = relative(ours["logits"][0, same], expected.logits[0, torch.from_numpy(same)])
    assert 1e-5 < error < HALF_TOLERANCE
    model = ir.load(tmp_path / "text.onnx")
    types = {value.name: value.dtype for value in [*model.graph.inputs, *model.graph.outputs]}
    assert types["past_key.0"] == types["present_value.0"] == ir.DataType.FLOAT16
    assert types["logits"] == types["hidden.0"] == types["inputs_embeds"] == ir.DataType.FLOAT
    for node in model.graph:  # norms and softmax-like parts read float32: no Cast to float16 feeds them
        if node.op_type in ("RMSNormalization", "TopK", "Sigmoid", "RotaryEmbedding", "ReduceMean"):
            producer = node.inputs[0].producer()
            assert producer is None or producer.op_type != "Cast" or producer.attributes["to"].as_int() == 1


def test_sums_in_place_of_float32_products_change_nothing_but_the_order(built: Built, tmp_path: Path) -> None:
    schemes, embeds = assign(built, HALF, HALF), built.embeds(1)[:, :9].numpy()
    wanted = text(built, schemes, tmp_path / "products").step(embeds)
    given = Lowering(built.config, built.checkpoint, schemes, tmp_path / "sums", capability=75)
    lower("text", built.canonical, given)
    found = InPlace(tmp_path / "sums" / "text.onnx", built.config, 1).step(embeds)
    assert relative(found["logits"], torch.from_numpy(wanted["logits"])) < 1e-3  # float16 rounds what differs at 1e-7
    wide = [node for node in ir.load(tmp_path / "sums" / "text.onnx").graph if node.op_type == "MatMul"]
    assert all(node.inputs[1].producer().op_type in ("Transpose", "Gather") for node in wide)
    assert not any(str(node.inputs[1].producer().inputs[0].name).endswith("router.weight") for node in wide)


def test_int4_computes_exactly_what_the_integers_stand_for(built: Built, tmp_path: Path) -> None:
    schemes = assign(built, INT4)
    embeds = built.embeds(1)
    ours = stepped(text(built, schemes, tmp_path), embeds.numpy(), CUTS)
    expected = whole(rounded(built.reference, schemes, tmp_path), embeds)
    assert relative(ours["logits"], expected.logits) < TOLERANCE
    assert relative(ours["logits"], whole(built.reference, embeds).logits) > 1e-2


@pytest.mark.parametrize("name", STATIC)
def test_static_eight_bits_compute_what_the_scheme_says(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    scheme = STATIC[name]
    roundings = round_inputs(built, scheme, tmp_path / "roundings") if scheme.calibrates else None
    embeds = built.embeds(1)
    ours = stepped(text(built, assign(built, scheme), tmp_path, roundings), embeds.numpy(), CUTS)
    with rounding(built.reference, scheme, monkeypatch):
        want = whole(built.reference, embeds)
    error = relative(ours["logits"], whole(built.reference, embeds).logits)
    assert error > 1e-3  # or nothing was rounded
    # as in test_lower_eight_bits.py: near the middle between two steps either side may round the other way
    assert relative(ours["logits"], want.logits) < OTHER_WAY * error
    assert relative(ours["logits"][:, :1], want.logits[:, :1]) < TOLERANCE


def test_only_standard_operators_are_left(built: Built, tmp_path: Path) -> None:
    text(built, assign(built, HALF, HALF), tmp_path)
    model = ir.load(tmp_path / "text.onnx")
    assert {node.domain for node in model.graph} == {""}
    assert dict(model.opset_imports) == {"": 24}
    assert not model.functions
    kinds = [node.op_type for node in model.graph]
    layers = built.config.text.layers
    assert kinds.count("Attention") == len(layers)
    assert kinds.count("TensorScatter") == 2 * len(layers)
    assert kinds.count("RotaryEmbedding") == 2 * sum(layer.rope for layer in layers)
    assert not {"Loop", "If", "Scan", "NonZero"} & set(kinds)


def test_an_unrouted_experts_weights_are_never_read(built: Built, tmp_path: Path) -> None:
    schemes = assign(built, Exact())
    stepper = text(built, schemes, tmp_path)
    embeds = built.embeds(1)[:, :9].numpy()
    wanted = stepper.step(embeds)
    model = ir.load(tmp_path / "text.onnx")
    for layer in built.config.text.moe_layers:
        idle = np.setdiff1d(np.arange(built.config.text.experts), wanted[f"expert_id.{layer}"])
        for kind in ("gate_up_proj", "down_proj") if len(idle) else ():
            name = f"language_model.model.layers.{layer}.feed_forward.experts.{kind}"
            value = model.graph.initializers[name]
            array = value.const_value.numpy().copy()
            array[idle] = np.nan
            value.const_value = ir.tensor(array, name=name)
    ir.save(model, tmp_path / "poisoned.onnx", external_data="poisoned.data")
    poisoned = InPlace(tmp_path / "poisoned.onnx", built.config, 1).step(embeds)
    assert np.array_equal(poisoned["logits"], wanted["logits"])


@pytest.mark.parametrize(
    ("experts", "per_token", "rows"), [(16, 1, 64), (128, 1, 16), (4, 2, 64), (64, 1, 16), (32, 1, 32)]
)
def test_tiles_are_as_high_as_experts_are_busy(experts: int, per_token: int, rows: int) -> None:
    assert tile_rows(experts, per_token) == rows


def vision_and_embed(tmp_path: Path, scheme: Scheme) -> Iterator[tuple[float, Any]]:
    toy = make_scout_toy(tmp_path / "toy", 4)
    config, checkpoint, reference = ModelConfig.load(toy), Checkpoint.open(toy), load_reference(toy)
    schemes = dict.fromkeys(checkpoint.tensors, scheme)
    for part, trace in (("vision", trace_vision), ("embed", trace_embed)):
        lower(
            part,
            trace(config, checkpoint, tmp_path / f"{part}.onnx"),
            Lowering(config, checkpoint, schemes, tmp_path / "out"),
        )
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = reference.image_features(pixels)
    (ours,) = ort.InferenceSession(tmp_path / "out/vision.onnx").run(None, {"pixel_values": pixels.numpy()})
    yield relative(ours, features), ours.dtype
    ids = torch.randint(0, IMAGE_TOKEN, (2, 9), generator=torch.Generator().manual_seed(0))
    ids[1, 2:6] = IMAGE_TOKEN
    (ours,) = ort.InferenceSession(tmp_path / "out/embed.onnx").run(
        None, {"input_ids": ids.numpy(), "image_features": features.numpy()}
    )
    yield relative(ours, reference.embed(ids, features)), ours.dtype


@pytest.mark.parametrize(("scheme", "tolerance"), [(Exact(), TOLERANCE), (HALF, HALF_TOLERANCE)], ids=["fp32", "fp16"])
def test_vision_and_embed_match_the_reference(tmp_path: Path, scheme: Scheme, tolerance: float) -> None:
    (vision, first), (embed, second) = vision_and_embed(tmp_path, scheme)
    assert vision < tolerance
    assert embed < 1e-3 * tolerance  # a table of bf16 values is exact in float16 but for the smallest
    assert first == second == np.float32


def test_bfloat16_weights_are_the_checkpoints_own_bytes(built: Built, tmp_path: Path) -> None:
    scheme = Half(kind="half", format="bfloat16")
    table = lower(
        "text", built.canonical, Lowering(built.config, built.checkpoint, assign(built, scheme, scheme), tmp_path)
    )
    name = "language_model.model.layers.1.self_attn.o_proj.weight"
    assert table[name]["dtype"] == "BF16"
    stored = ir.load(tmp_path / "text.onnx").graph.initializers[name].const_value
    assert isinstance(stored, ir.ExternalTensor)
    raw = (tmp_path / stored.location).read_bytes()[stored.offset : stored.offset + stored.nbytes]
    assert raw == built.checkpoint.read_rows(name, 0, 64).tobytes()


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (Fp8(kind="fp8", activations="fp8"), "fp8 activations per token"),
        (Int8Dynamic(kind="int8_dynamic"), "int8 activations per token"),
        (IntBlock(kind="int_block", bits=8, block=32, accuracy_level=4), "int8 in blocks of 32"),
        (IntBlock(kind="int_block", bits=4, block=32, accuracy_level=4), "int4 in blocks of 32, int8 activations"),
        (INT4, None),
        (Fp8Static(kind="fp8_static"), None),
        (HALF, None),
    ],
)
def test_what_cannot_be_honoured_is_told_by_name(scheme: Scheme, words: str | None) -> None:
    told = lacks(scheme)
    assert told is None if words is None else told is not None and words in told


def test_two_sixteen_bit_formats_in_one_profile_are_refused(built: Built, tmp_path: Path) -> None:
    schemes = assign(built, HALF, Half(kind="half", format="bfloat16"))
    with pytest.raises(ArrieroError, match="both 16-bit formats"):
        activations(schemes)
    assert activations(assign(built, INT4, HALF)) == "F16"
    assert activations(load_profile("fp32").assign(built.checkpoint.tensors)) == "F32"


def test_a_value_beyond_float16_is_refused_by_name() -> None:
    with pytest.raises(ArrieroError, match=r"q_proj: 1 of 3 values are beyond what float16 holds"):
        narrow(np.array([1, 1e6, 2], np.float32), np.dtype(np.float16), "q_proj")
    assert narrow(np.array([1e6], np.float32), np.dtype(ml_dtypes.bfloat16), "q_proj") == ml_dtypes.bfloat16(1e6)
