"""The graphs lowered for TVM: their signature, and weights that are where and what the kernels expect."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from safetensors.torch import load_file, save_file

from arriero.errors import ArrieroError
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.config import ModelConfig
from arriero.graphs.lower import tvm as lowering_for_tvm
from arriero.graphs.lower.part import Lowering
from arriero.graphs.lower.tvm import lower
from arriero.graphs.passes.fold_reshape_shapes import fold_reshape_shapes
from arriero.graphs.passes.keep_token_axes import keep_token_axes
from arriero.graphs.trace import trace_embed, trace_text, trace_vision
from arriero.profiles.float8 import dequantize_float8, quantize_float8
from arriero.profiles.grids import Grid
from arriero.profiles.journal import FILE
from arriero.profiles.recipe import load_profile
from arriero.profiles.schemes import IntBlock
from arriero.profiles.stored_values import stored_values
from tests.flip import flip
from tests.toys import make_maverick_toy, make_scout_toy

EXPERTS = "language_model.model.layers.1.feed_forward.experts"
DOWN = "language_model.model.layers.1.feed_forward.experts.down_proj"
GATE_UP = "language_model.model.layers.1.feed_forward.experts.gate_up_proj"
SHARED = "language_model.model.layers.1.feed_forward.shared_expert.down_proj.weight"


class Built:
    """A toy with its canonical graphs; `lower` gives the folder and the weight table of one lowering."""

    def __init__(self, folder: Path, vision: bool) -> None:
        self.folder = folder
        self.toy = make_scout_toy(folder / "toy", 1) if vision else make_maverick_toy(folder / "toy", 2)
        self.config, self.checkpoint = ModelConfig.load(self.toy), Checkpoint.open(self.toy)
        self.graphs = {"text": trace_text(self.config, self.checkpoint, folder / "text.onnx")}
        self.graphs["embed"] = trace_embed(self.config, self.checkpoint, folder / "embed.onnx")
        if vision:
            self.graphs["vision"] = trace_vision(self.config, self.checkpoint, folder / "vision.onnx")

    def lower(self, profile: str, out: Path) -> dict[str, dict[str, Any]]:
        schemes = load_profile(profile).assign(self.checkpoint.tensors)
        out.mkdir()
        table = {}
        for part, graph in self.graphs.items():
            table |= lower(part, graph, Lowering(self.config, self.checkpoint, schemes, out))
        return table


@pytest.fixture(scope="module", params=["scout", "maverick"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("lowered"), request.param == "scout")


@pytest.fixture(scope="module")
def scout(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("lowered"), vision=True)


def weight(out: Path, part: str, name: str) -> np.ndarray:
    """The values of an initialiser of a lowered graph, from the file it is bound to; bf16 as its bits."""
    tensor = ir.load(out / f"{part}.onnx").graph.initializers[name].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    dtype = {"FLOAT": np.float32, "FLOAT16": np.float16, "BFLOAT16": np.uint16, "UINT8": np.uint8}[tensor.dtype.name]
    shape = tuple(tensor.shape.numpy())
    return np.fromfile(out / tensor.location, dtype, int(np.prod(shape)), offset=tensor.offset).reshape(shape)


def records(out: Path) -> list[ir.ExternalTensor]:
    """The records of layer 1's experts."""
    initializers = ir.load(out / "text.onnx").graph.initializers
    stems = [name for name in initializers if name.rpartition(".")[0] == EXPERTS]
    values = [initializers[f"{EXPERTS}.{expert}"].const_value for expert in range(len(stems))]
    assert values
    return [value for value in values if isinstance(value, ir.ExternalTensor)]


def record_layout(out: Path) -> dict[str, Any]:
    """What the nodes of layer 1's experts say of their records."""
    graph = ir.load(out / "text.onnx").graph
    (table,) = (node for node in graph if node.op_type == "ExpertTable" and node.outputs[0].name == EXPERTS)
    (dispatch,) = (node for node, _ in table.outputs[0].uses() if node.op_type == "ExpertDispatch")
    return {name: attribute.value for node in (table, dispatch) for name, attribute in node.attributes.items()}


def part(out: Path, record: ir.ExternalTensor, at: int, like: np.ndarray) -> np.ndarray:
    """An array of dtype and shape of `like`, from a place in a record."""
    assert record.offset is not None
    array = np.fromfile(out / record.location, like.dtype, like.size, offset=record.offset + at)
    return array.reshape(like.shape)


def test_text_has_one_node_per_kernel_and_caches_as_inputs_only(built: Built, tmp_path: Path) -> None:
    built.lower("fp32", tmp_path / "out")
    model = ir.load(tmp_path / "out" / "text.onnx")
    text = built.config.text
    kinds = Counter(node.op_type for node in model.graph)
    dense = len(text.layers) - len(text.moe_layers)
    assert kinds["CachedAttention"] == len(text.layers)
    for kind in ("ExpertTable", "ExpertRequest", "ExpertDispatch", "RouteTokens"):
        assert kinds[kind] == len(text.moe_layers)
    assert kinds["Linear"] == 4 * len(text.layers) + 4 * len(text.moe_layers) + 3 * dense + 1
    assert not {"MatMul", "Gemm", "Transpose", "Scan", "Concat"} & set(kinds)
    inputs = [value.name for value in model.graph.inputs]
    caches = [f"past_{kind}.{i}" for i in range(len(text.layers)) for kind in ("key", "value")]
    routing = [f"forced_expert_id.{layer}" for layer in text.moe_layers]
    assert inputs == ["inputs_embeds", "positions", "logits_index", *caches, "row_starts", *routing]
    outputs = [str(value.name) for value in model.graph.outputs]
    assert outputs[0] == "logits"
    assert {name.partition(".")[0] for name in outputs[1:]} == {"hidden", "expert_id"}


def split_toy(built: Built, folder: Path) -> Checkpoint:
    """The toy with its experts in a file of their own, as large checkpoints have them in many."""
    folder.mkdir()
    shutil.copyfile(built.toy / "config.json", folder / "config.json")
    tensors = load_file(built.toy / "model.safetensors")
    files = {"experts": {}, "rest": {}}
    for name, tensor in tensors.items():
        files["experts" if ".experts." in name else "rest"][name] = tensor
    for name, own in files.items():
        save_file(own, folder / f"{name}.safetensors")
    where = {name: f"{file}.safetensors" for file, own in files.items() for name in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return Checkpoint.open(folder)


def test_an_exact_profile_reads_the_matrices_in_the_checkpoints_own_file(built: Built, tmp_path: Path) -> None:
    out = tmp_path / "out"
    checkpoint = split_toy(built, tmp_path / "split")
    schemes = load_profile("fp32").assign(checkpoint.tensors)
    table = lower("text", built.graphs["text"], Lowering(built.config, checkpoint, schemes, out))
    link = out / "weights" / "rest.safetensors"
    assert link.samefile(tmp_path / "split" / "rest.safetensors")
    for name, entry in table.items():
        if len(entry["shape"]) > 1:
            file = "weights/text-experts-00001.safetensors" if ".experts." in name else "weights/rest.safetensors"
            assert (entry["files"], entry["dtype"]) == ([file], "BF16")
    own = sum(
        file.stat().st_size for file in (out / "weights").iterdir() if file != link and "experts" not in file.name
    )
    assert own < 100_000  # norms and biases, widened


@pytest.mark.parametrize("how", ["changed", "cut short by a kill"])
def test_a_copy_of_a_checkpoints_file_that_a_killed_build_left_is_used_as_it_was_made_only(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Where the file system has no links; the copy of a finished lowering is not made twice."""
    copies: list[Path] = []

    def copy(source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        copies.append(target)

    monkeypatch.setattr(lowering_for_tvm, "link_file", copy)
    checkpoint, told = split_toy(built, tmp_path / "split"), list[str]()
    schemes = load_profile("fp32").assign(checkpoint.tensors)
    lowering = Lowering(built.config, checkpoint, schemes, tmp_path / "out", tell=told.append)
    (place,) = lowering_for_tvm._link_checkpoint(lowering).values()
    lowering_for_tvm._link_checkpoint(lowering)
    assert copies == [tmp_path / "out" / place]
    if how == "changed":
        flip(copies[0], -1)
    else:
        copies[0].write_bytes(copies[0].read_bytes()[:100])
        (tmp_path / "out" / FILE).unlink()
    lowering_for_tvm._link_checkpoint(lowering)
    assert len(copies) == 2
    assert copies[0].read_bytes() == (tmp_path / "split" / "rest.safetensors").read_bytes()
    assert len(told) == (how == "changed")


def test_each_expert_is_one_record_on_pages_of_its_own(built: Built, tmp_path: Path) -> None:
    out, checkpoint = tmp_path / "out", built.checkpoint
    built.lower("fp32", out)
    layout = record_layout(out)
    assert (layout["formats"], layout["blocks"], layout["layout"]) == (
        ("BF16",) * 2,
        (0, 0),
        "columns:BF16,columns:BF16",
    )
    down, gate_up = (checkpoint.read_rows(name, 0, built.config.text.experts) for name in (DOWN, GATE_UP))
    for expert, record in enumerate(records(out)):
        assert record.offset % 4096 == record.nbytes % 4096 == 0
        assert np.array_equal(part(out, record, layout["at"][0], gate_up[expert]), gate_up[expert])
        assert np.array_equal(part(out, record, layout["at"][2], down[expert]), down[expert])


def test_no_file_of_weights_is_larger_than_the_target_says(built: Built, tmp_path: Path) -> None:
    schemes = load_profile("int8").assign(built.checkpoint.tensors)
    whole, split = tmp_path / "whole", tmp_path / "split"
    lowered = Lowering(built.config, built.checkpoint, schemes, whole)
    lower("text", built.graphs["text"], lowered)
    most = max(file.stat().st_size for file in (whole / "weights").iterdir()) // 3
    table = lower("text", built.graphs["text"], replace(lowered, out_dir=split, shard=most))
    files = sorted(file for file in (split / "weights").iterdir())
    assert all(file.stat().st_size <= most for file in files)
    assert {file.name.rpartition("-")[2] for file in files} >= {"00001.safetensors", "00003.safetensors"}
    assert {f"weights/{file.name}" for file in files} == {file for entry in table.values() for file in entry["files"]}
    for one, other in zip(records(whole), records(split), strict=True):
        assert np.array_equal(part(whole, one, 0, np.empty(one.nbytes, np.uint8)), part(split, other, 0, one.numpy()))


def test_a_weight_larger_than_a_shard_has_a_file_of_its_own(built: Built, tmp_path: Path) -> None:
    schemes = load_profile("int8").assign(built.checkpoint.tensors)
    lowered = Lowering(built.config, built.checkpoint, schemes, tmp_path / "split", shard=4096)
    lower("text", built.graphs["text"], lowered)
    files = Counter(record.location for record in records(tmp_path / "split"))
    assert set(files.values()) == {1}


def test_the_shared_expert_runs_while_records_are_read(built: Built, tmp_path: Path) -> None:
    built.lower("int8", tmp_path / "out")
    nodes = list(ir.load(tmp_path / "out" / "text.onnx").graph)
    for request in (node for node in nodes if node.op_type == "ExpertRequest"):
        (dispatch,) = (node for node, _ in request.outputs[0].uses())
        between = nodes[nodes.index(request) : nodes.index(dispatch)]
        assert [node.op_type for node in between].count("Linear") == 3
        assert nodes[nodes.index(request) - 1].op_type in ("RouteTokens", "ExpertTable")


def test_a_rounded_profile_writes_what_it_needs_and_links_nothing(scout: Built, tmp_path: Path) -> None:
    table = scout.lower("int8", tmp_path / "out")
    files = {file for entry in table.values() for file in entry["files"]}
    names = ("text", "text-experts", "embed", "vision")
    assert files == {f"weights/{name}-00001.safetensors" for name in names}
    assert sorted(file.name for file in (tmp_path / "out" / "weights").iterdir()) == sorted(
        file.rpartition("/")[2] for file in files
    )
    assert {entry["scheme"] for entry in table.values()} == {"exact", "int8 block 32"}
    assert table["language_model.model.layers.0.self_attn.q_proj.weight"]["dtype"] == "BF16"
    layers = scout.config.text.experts, 2 * scout.config.text.expert_ffn // 16
    assert table[f"{GATE_UP}.packed"]["shape"][:2] == [*layers]


def unpacked(packed: np.ndarray, scales: np.ndarray, scheme: IntBlock) -> np.ndarray:
    """Values [.., 16 P, K] of panels, element by element as arriero_kernels.h tells their layout."""
    *leading, panels, steps, _ = packed.shape
    codes = packed[..., :64].reshape(*leading, panels, steps, 16, 4)
    if scheme.bits == 4:
        codes = np.concatenate([codes & 15, codes >> 4], -1)
    elif scheme.bits < 4:
        codes = np.concatenate([codes >> shift & 3 for shift in (2, 6, 0, 4)], -1)  # of quads 0 to 3
    if scheme.bits == 3:
        nibbles = np.concatenate([packed[..., 64:] & 15, packed[..., 64:] >> 4], -1).reshape(*codes.shape[:-1], 4)
        codes = codes | np.concatenate([(nibbles >> quad & 1) << 2 for quad in range(4)], -1)
    integers = Grid(scheme.bits, scheme.grid).levels(codes.swapaxes(-3, -2).reshape(*leading, panels, 16, -1))
    factors = np.repeat(scales.astype(np.float32).swapaxes(-2, -1), scheme.block, -1)  # [.., P, 16, K]
    return (integers * factors).reshape(*leading, panels * 16, -1)


@pytest.mark.parametrize(("profile", "codes"), [("int8", "INT8"), ("int4", "INT4"), ("int4-nl", "GRID4")])
def test_panels_stand_for_the_integers_of_the_profile(scout: Built, tmp_path: Path, profile: str, codes: str) -> None:
    out, checkpoint = tmp_path / "out", scout.checkpoint
    out.mkdir()
    rtn = load_profile(profile).rtn_baseline()  # nearest rounding: no calibration has run here
    schemes = {
        name: scheme.model_copy(update={"block": 32}) if isinstance(scheme, IntBlock) else scheme  # the toy is narrow
        for name, scheme in rtn.assign(checkpoint.tensors).items()
    }
    table = lower("text", scout.graphs["text"], Lowering(scout.config, checkpoint, schemes, out))
    layout = record_layout(out)
    assert layout["layout"].split(",") == [f"panels16:{codes}:F16/32"] * 2
    assert list(layout["formats"]) == [f"{codes}_F16"] * 2

    def rounded(rows: np.ndarray, name: str) -> np.ndarray:
        scheme = schemes[name]
        assert isinstance(scheme, IntBlock)
        return stored_values(np.ascontiguousarray(rows), scheme, name=name)

    def stored(name: str) -> np.ndarray:
        scheme = schemes[name]
        assert isinstance(scheme, IntBlock)
        return unpacked(weight(out, "text", f"{name}.packed"), weight(out, "text", f"{name}.scales"), scheme)

    def expert(name: str, record: ir.ExternalTensor, number: int) -> np.ndarray:
        scheme, entries = schemes[name], [table[f"{name}.{kind}"] for kind in ("packed", "scales")]
        assert isinstance(scheme, IntBlock)
        likes = [
            np.empty(entry["shape"][1:], dtype) for entry, dtype in zip(entries, (np.uint8, np.float16), strict=True)
        ]
        return unpacked(*(part(out, record, layout["at"][number + i], like) for i, like in enumerate(likes)), scheme)

    whole = checkpoint.read_float32(SHARED, 0, checkpoint.tensors[SHARED].shape[0])
    assert np.allclose(stored(SHARED)[: len(whole)], rounded(whole, SHARED), rtol=1e-6)
    experts = scout.config.text.experts
    down, gate_up = checkpoint.read_float32(DOWN, 0, experts), checkpoint.read_float32(GATE_UP, 0, experts)
    for number, record in enumerate(records(out)):
        assert np.allclose(expert(DOWN, record, 2), rounded(down[number].T, DOWN), rtol=1e-6)
        gate, up = np.split(rounded(gate_up[number].T, GATE_UP), 2)
        turns = expert(GATE_UP, record, 0).reshape(-1, 2, 16, gate.shape[1])  # gate and up panels in turns
        assert np.allclose(turns[:, 0].reshape(gate.shape), gate, rtol=1e-6)
        assert np.allclose(turns[:, 1].reshape(up.shape), up, rtol=1e-6)


def test_fp8_panels_stand_for_the_floats_of_the_profile(scout: Built, tmp_path: Path) -> None:
    out, checkpoint = tmp_path / "out", scout.checkpoint
    out.mkdir()
    lower(
        "text",
        scout.graphs["text"],
        Lowering(scout.config, checkpoint, load_profile("fp8").assign(checkpoint.tensors), out),
    )
    whole = checkpoint.read_float32(SHARED, 0, checkpoint.tensors[SHARED].shape[0])
    codes, scales = (weight(out, "text", f"{SHARED}.{kind}") for kind in ("packed", "scales"))
    values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scales[:, None]  # [P, K, 16]
    stored = values.swapaxes(1, 2).reshape(-1, whole.shape[1])[: len(whole)]
    assert np.allclose(stored, dequantize_float8(quantize_float8(whole, name=SHARED)), rtol=1e-6)
    experts = checkpoint.read_float32(GATE_UP, 0, 2)
    at, width = record_layout(out)["at"], experts.shape[2]
    codes = part(out, records(out)[1], at[0], np.empty((width // 16, experts.shape[1], 16), np.uint8))
    scales = part(out, records(out)[1], at[1], np.empty((width // 16, 16), np.float32))
    values = (codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scales[:, None]).swapaxes(1, 2)  # [P, 16, K]
    wanted = dequantize_float8(quantize_float8(np.ascontiguousarray(experts[1].T), name=GATE_UP))
    assert np.allclose(values[0::2].reshape(-1, wanted.shape[1]), np.split(wanted, 2)[0], rtol=1e-6)
    assert np.allclose(values[1::2].reshape(-1, wanted.shape[1]), np.split(wanted, 2)[1], rtol=1e-6)


def test_a_vector_in_integers_is_refused_by_name(scout: Built, tmp_path: Path) -> None:
    name = "language_model.model.layers.1.input_layernorm.weight"
    eight = IntBlock(kind="int_block", bits=8, block=32, accuracy_level=4)
    schemes = {**load_profile("fp32").assign(scout.checkpoint.tensors), name: eight}
    with pytest.raises(ArrieroError, match=r"input_layernorm.*no kernel of the backend reads it so"):
        lower("text", scout.graphs["text"], Lowering(scout.config, scout.checkpoint, schemes, tmp_path))


def test_lowering_leaves_the_canonical_graph_alone(scout: Built, tmp_path: Path) -> None:
    before = sorted(node.op_type for node in scout.graphs["text"].graph)
    scout.lower("fp32", tmp_path / "out")
    assert sorted(node.op_type for node in scout.graphs["text"].graph) == before


def graph_of(nodes: list[ir.Node], inputs: list[ir.Value], outputs: list[ir.Value]) -> ir.Model:
    return ir.Model(ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": 23}), ir_version=10)


def value(name: str, shape: list[Any]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))


def reshape(source: ir.Value, shape: list[Any]) -> tuple[ir.Node, ir.Value]:
    target = ir.Value(name="target")
    out = value("out", shape)
    return ir.Node("", "Reshape", [source, target], outputs=[out]), out


@pytest.mark.parametrize(
    ("before", "after", "target"),
    [
        (["batch", "seq", 64], ["batch", "seq", 4, 16], (0, 0, 4, 16)),
        (["batch", "seq", 64], ["tokens", 64], (-1, 64)),
        (["tiles", 3, 8], [24, "tiles"], (24, -1)),
        (["tokens", 64], ["batch", "seq", 64], None),
    ],
)
def test_reshapes_get_constant_targets_where_shapes_decide(before, after, target) -> None:
    source = value("x", before)
    node, out = reshape(source, after)
    model = graph_of([node], [source], [out])
    assert fold_reshape_shapes(model) == (target is not None)
    made = model.graph[-1].inputs[1].producer()
    assert (tuple(made.attributes["value_ints"].value) if made else None) == target


def test_token_axes_are_kept_apart() -> None:
    x = value("x", ["batch", "seq", 8])
    fold, flat = reshape(x, ["seq*batch", 8])
    double = ir.Node("", "Add", [flat, flat], outputs=[value("double", ["seq*batch", 8])])
    unfold, y = reshape(double.outputs[0], ["batch", "seq", 8])
    last = ir.Node("", "Identity", [y], outputs=[value("end", ["batch", "seq", 8])])
    model = graph_of([fold, double, unfold, last], [x], list(last.outputs))
    assert keep_token_axes(model) == 2
    assert [node.op_type for node in model.graph] == ["Add", "Identity"]
    assert list(double.inputs) == [x, x]
