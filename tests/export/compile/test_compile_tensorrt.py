"""Engines of TensorRT for RTX, built by the real parser and builder on a machine without a GPU. Built, not run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import onnx
import onnx_ir as ir
import pytest

from arriero.errors import ArrieroError, MachineLacks
from arriero.export.compile import Device, MemoryBudget, tensorrt
from arriero.export.compile.nvidia import tensorrt_api
from arriero.export.compile.nvidia.engine_shapes import Limits, settle_capacities
from arriero.export.compile.nvidia.gpus import Gpu
from arriero.export.compile.nvidia.tensorrt_api import RTX, TENSORRT, Api
from arriero.export.compile.tensorrt_rtx import compile_graphs
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.config import ModelConfig
from arriero.graphs.lower.part import Lowering
from arriero.graphs.lower.tensorrt import lower as lower_for_tensorrt
from arriero.graphs.lower.tensorrt_rtx import lower
from arriero.graphs.names import EMBEDDING
from arriero.graphs.trace import trace_embed, trace_text, trace_vision
from arriero.profiles.recipe import load_profile
from arriero.runtimes import tensorrt_rtx
from arriero.runtimes.nvidia.products import Product, listen
from tests.graphs.test_lower_onnxruntime import TOYS

CHASQUI = Path(__file__).parents[3] / "models" / "chasqui"
LIMITS = Limits(context=1024, batch=4, chunk=128)
PARTS = ("embed", "vision", "text")
TRACES: dict[str, Callable[..., ir.Model]] = {"embed": trace_embed, "vision": trace_vision, "text": trace_text}


@pytest.fixture(scope="session")
def rtx() -> Api:
    try:
        return tensorrt_api.load(RTX)
    except MachineLacks as lack:
        pytest.skip(str(lack))


class Traced:
    """A checkpoint with its canonical graphs."""

    def __init__(self, model: Path, folder: Path, parts: tuple[str, ...] = PARTS) -> None:
        self.config, self.checkpoint = ModelConfig.load(model), Checkpoint.open(model)
        self.graphs = {part: TRACES[part](self.config, self.checkpoint, folder / part) for part in parts}

    def lower(self, profile: str, out: Path, parts: tuple[str, ...] = PARTS, capability: int = 0) -> Path:
        """The graphs under the RTN baseline of `profile`: what calibration finds changes numbers, and no graph."""
        schemes = load_profile(profile).rtn_baseline().assign(self.checkpoint.tensors)
        for part in parts:
            lower(part, self.graphs[part], Lowering(self.config, self.checkpoint, schemes, out, capability=capability))
        return out


@pytest.fixture(scope="module")
def chasqui(rtx: Api, tmp_path_factory: pytest.TempPathFactory) -> Traced:
    return Traced(CHASQUI, tmp_path_factory.mktemp("traced"))


Kernel = tuple[str, list[tuple[str, str]]]


def kernels(log: Any) -> list[Kernel]:
    """What the last graph became, as the compiler lists it: each kernel's kind, and the (shape, dtype) it touches."""
    lines = [line for text in log.layers for line in text.splitlines()]
    named = ((re.match(r"\s*Name: .+?, LayerType: (\w+)", line), line) for line in lines)
    return [(kind[1], re.findall(r"Dimensions: \[([^\]]*)\].*?Datatype: (\w+)", line)) for kind, line in named if kind]


@pytest.mark.parametrize(
    ("profile", "gpu", "stored", "multiplied"),
    [
        ("fp16", 75, "Half", "Half"),
        ("bf16", 121, "BFloat16", "BFloat16"),
        ("gpu-int8", 80, "Int8", "Int8"),
        ("gpu-fp8", 120, "FP8", "FP8"),
        ("gpu-int4", 89, "Int4", "Half"),
    ],
)
def test_the_trained_model_becomes_engines(
    chasqui: Traced, rtx: Api, tmp_path: Path, profile: str, gpu: int, stored: str, multiplied: str
) -> None:
    chasqui.lower(profile, tmp_path, capability=gpu)
    reports: list[tuple[str, int, int, str]] = []
    device = Device(gpu=Gpu(gpu), limits=LIMITS)
    made = compile_graphs(tmp_path, PARTS, device, lambda *report: reports.append(report))
    assert (made.tools, made.gpu, made.plugins) == ({RTX: rtx.version}, f"sm_{gpu}", {})
    for part in PARTS:
        steps = [done for step, done, *_ in reports if step == f"compile {part}"]
        assert steps == sorted(set(steps))
        assert (steps[0], steps[-1]) == (0, 100)
    # neither graphs nor a second copy of the weights is left
    assert {path.name for path in tmp_path.iterdir()} == {f"{x}.{kind}" for x in PARTS for kind in ("engine", "json")}
    shapes = {name: info.shape for name, info in chasqui.checkpoint.tensors.items()}
    weights = sum(scheme.stored_bytes(shapes[name]) for name, scheme in load_profile(profile).assign(shapes).items())
    engines = sum((tmp_path / f"{part}.engine").stat().st_size for part in PARTS)
    assert weights < engines < weights + (32 << 20)  # two profiles are two programs over one set of weights
    check_signature(json.loads((tmp_path / "text.json").read_text()), "BFLOAT16" if profile == "bf16" else "FLOAT16")

    # What reads a stack of experts hands on the tiles' own, as narrow as the profile stores or multiplies them.
    found = kernels(listen(rtx.module))
    readers = [touched for _, touched in found if ("16,256,256", stored) in touched]
    assert len(readers) == 2 * 4  # in each profile and layer
    assert all(
        [one for one in touched if one[0] == "-1,256,256"] == [("-1,256,256", multiplied)] for touched in readers
    )
    stacks = {one for _, touched in found for one in touched if one[0] in ("16,256,256", "16,128,256")}
    assert {dtype for _, dtype in stacks} == {stored}  # never all sixteen widened
    products = [touched for _, touched in found if ("-1,256,256", multiplied) in touched and touched not in readers]
    assert len(products) == 2 * 4
    assert all(("-1,64,256", multiplied) in touched for touched in products)


def check_signature(signature: dict[str, Any], dtype: str) -> None:
    inputs = {one["name"]: one for one in signature["inputs"]}
    assert inputs["past_key.0"] == {"name": "past_key.0", "dtype": dtype, "shape": ["batch", 2, 128, 32]}
    assert inputs["past_value.3"]["shape"] == ["batch", 2, 1024, 32]
    assert inputs["inputs_embeds"] == {"name": "inputs_embeds", "dtype": "FLOAT", "shape": ["batch", "seq", 256]}
    outputs = {one["name"]: one for one in signature["outputs"]}
    assert outputs["present_key.0"] == {**inputs["past_key.0"], "name": "present_key.0"}
    assert outputs["expert_id.1"]["dtype"] == "INT64"
    decode, prefill = signature["profiles"]
    assert (decode["name"], prefill["name"]) == ("decode", "prefill")
    assert decode["ranges"]["positions"] == [[1, 1], [4, 1], [4, 1]]
    assert prefill["ranges"]["positions"] == [[1, 1], [1, 128], [1, 128]]


@pytest.mark.parametrize("shape", ["maverick", "top-2 and tied"])  # the trained model is of Scout's
def test_every_shape_of_llama_4_is_taken(rtx: Api, tmp_path: Path, shape: str) -> None:
    model = TOYS[shape](tmp_path / "toy")
    traced = Traced(model, tmp_path / "graphs", ("text",))
    compile_graphs(
        traced.lower("fp16", tmp_path / "out", ("text",)), ("text",), Device(gpu=Gpu(89), limits=Limits(64, 2, 16))
    )
    signature = json.loads((tmp_path / "out" / "text.json").read_text())
    assert signature["profiles"][1]["ranges"]["logits_index"] == [[1], [1], [16]]
    assert (tmp_path / "out" / "text.engine").stat().st_size > traced.checkpoint.tensors[EMBEDDING].nbytes


def graph(path: Path, body: str, opset: str = "") -> None:
    head = f'<ir_version: 11, opset_import: ["" : 24{opset}]>'
    text = f"{head} g (float[batch, seq, 8] x) => (float[batch, seq, 8] y) {{ {body} }}"
    onnx.save(onnx.parser.parse_model(text), path)


def test_a_node_that_the_parser_does_not_take_is_named(rtx: Api, tmp_path: Path) -> None:
    graph(tmp_path / "text.onnx", "z = Abs(x)\n y = Mystery(z)")
    with pytest.raises(ArrieroError, match=r"TensorRT for RTX 1\..* does not take the graph") as caught:
        compile_graphs(tmp_path, ("text",), Device(gpu=Gpu(89), limits=LIMITS))
    assert "text.onnx: node " in str(caught.value)
    assert "(Mystery)" in str(caught.value)
    assert not (tmp_path / "text.engine").exists()


def test_scratch_space_has_a_limit(chasqui: Traced, tmp_path: Path) -> None:
    chasqui.lower("fp16", tmp_path, ("text",))
    with pytest.raises(ArrieroError, match=r"text\.onnx: the engine needs more scratch.*1048576.*budgets\.gpu_memory"):
        compile_graphs(tmp_path, ("text",), Device(gpu=Gpu(89), limits=LIMITS, memory=MemoryBudget(1 << 20)))


def test_weights_that_a_budget_has_no_room_for_are_streamed(chasqui: Traced, tmp_path: Path) -> None:
    chasqui.lower("fp16", tmp_path, ("text",))
    compile_graphs(tmp_path, ("text",), Device(gpu=Gpu(89), limits=LIMITS, memory=MemoryBudget(1 << 30, 4 << 20)))
    assert json.loads((tmp_path / "text.json").read_text())["weights_on_gpu"] == 4 << 20
    assert (tmp_path / "text.engine").stat().st_size > 16 << 20  # the plan has them all


def test_what_the_builder_refuses_is_told_in_its_own_words(chasqui: Traced, tmp_path: Path) -> None:
    chasqui.lower("gpu-fp8", tmp_path, ("text",))
    with pytest.raises(ArrieroError, match=r"text\.onnx: TensorRT for RTX .* builds no engine for sm_86 .*fp8_e4m3"):
        compile_graphs(tmp_path, ("text",), Device(gpu=Gpu(86), limits=LIMITS))


class Compiled:
    """Our own kernels, as if they had been compiled."""

    hashes: ClassVar[dict[str, str]] = {"gate_up_decode_f16_exact": "0" * 64}


def test_our_own_nodes_bring_their_kernels_into_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_api, "local_gpus", lambda: (Gpu(89),))
    monkeypatch.setattr(tensorrt, "build_engine", lambda *given: b"engine")
    product = ModuleType("tensorrt")
    product.__dict__.update(__version__="10.16.0", ILogger=object)
    graph(tmp_path / "text.onnx", "y = arriero.ExpertGateUp (x)", ', "arriero" : 1')
    graph(tmp_path / "embed.onnx", "y = Abs(x)")
    asked: list[str] = []
    made = tensorrt.compile_graphs(
        tmp_path,
        ("embed", "text"),
        Device(gpu=Gpu(89), limits=LIMITS),
        api=Api(TENSORRT, product),
        plugins=lambda gpu: asked.append(gpu) or Compiled(),
    )
    assert asked == ["sm_89"]  # once, and for no graph without such nodes
    assert (made.plugins, made.tools) == (Compiled.hashes, {TENSORRT: "10.16.0"})
    assert json.loads((tmp_path / "text.json").read_text())["plugins"] == Compiled.hashes
    assert "plugins" not in json.loads((tmp_path / "embed.json").read_text())


def test_tensorrt_itself_needs_the_gpu_it_builds_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_api, "local_gpus", lambda: (Gpu(89),))
    with pytest.raises(MachineLacks, match=r"only on the kind of GPU.*8\.7.*tensorrt-rtx"):
        tensorrt.compile_graphs(tmp_path, (), Device(gpu=Gpu(87), limits=LIMITS), api=Api(TENSORRT, None))


@pytest.mark.parametrize(
    ("version", "ok"), [("10.16.1", True), ("11.0.0.99", True), ("10.15.2", False), ("8.6.1", False), ("12.0", False)]
)
def test_two_majors_of_tensorrt_are_taken(monkeypatch: pytest.MonkeyPatch, version: str, ok: bool) -> None:
    module = ModuleType(TENSORRT)
    module.__dict__.update(__version__=version)
    monkeypatch.setattr(Product, "load", lambda self: module)
    if ok:
        assert tensorrt_api.load(TENSORRT).version == version
    else:
        with pytest.raises(MachineLacks, match=f"TensorRT {version} is installed; expected 10.16 or 11.0"):
            tensorrt_api.load(TENSORRT)


def test_bindings_and_libraries_of_two_versions_are_refused(
    rtx: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_rtx, "_libraries", lambda: [tmp_path / "libtensorrt_rtx.so.1.6.1"])
    monkeypatch.setattr(tensorrt_rtx.ctypes, "CDLL", lambda *given: None)
    with pytest.raises(ArrieroError, match=r"bindings are of version 1\.7.* and the libraries of 1\.6\.1"):
        tensorrt_api.load(RTX)


def test_tensorrts_own_mixture_of_experts_is_parsed(chasqui: Traced, rtx: Api, tmp_path: Path) -> None:
    """The parser of TensorRT for RTX knows the node, and infers what follows it; its builder has no kernel for it."""
    schemes = load_profile("fp16").assign(chasqui.checkpoint.tensors)
    given = Lowering(chasqui.config, chasqui.checkpoint, schemes, tmp_path, capability=110)
    lower_for_tensorrt("text", chasqui.graphs["text"], given)
    model = ir.load(tmp_path / "text.onnx")
    settle_capacities(model, LIMITS)
    ir.save(model, tmp_path / "text.onnx")
    log = listen(rtx.module)
    network = rtx.module.Builder(log).create_network(rtx.network_flags)
    assert rtx.module.OnnxParser(network, log).parse_from_file(str(tmp_path / "text.onnx"))
    layers = [network.get_layer(number) for number in range(network.num_layers)]
    found = [layer for layer in layers if layer.type == rtx.module.LayerType.MOE]
    assert len(found) == 4
    for layer in found:
        assert tuple(layer.get_output(0).shape)[::2] == (1, 256)
        assert layer.get_output(0).dtype == rtx.module.DataType.HALF
    with pytest.raises(ArrieroError, match=r"text\.onnx: .* builds no engine for sm_120"):
        compile_graphs(tmp_path, ("text",), Device(gpu=Gpu(120), limits=LIMITS))
