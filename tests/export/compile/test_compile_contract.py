"""Lowering, compiling and running through the recorded calls of each TensorRT: a contract test, no GPU and no TensorRT.

The compiler builds over a recorder; the plans that it writes are run by the backend over the same version's recorder,
with the PyTorch reference behind them. So names, types, shapes and profiles have to agree from graph to session.
"""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arriero.errors import ArrieroError
from arriero.export.compile import Device, MemoryBudget
from arriero.export.proof.reference import TorchBackend
from arriero.graphs import trace
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.config import ModelConfig
from arriero.graphs.lower.part import Lowering
from arriero.profiles.recipe import load_profile
from arriero.runtimes.tensorrt import TensorRtBackend
from arriero.traits import TRAITS
from tests.command import arriero
from tests.small import small_scout
from tests.tensorrt.fake_builder import Building
from tests.tensorrt.fake_cuda import FakeCuda
from tests.tensorrt.fake_engine import FakeTensorRt
from tests.toys import load_reference, make_scout_toy

pytestmark = pytest.mark.usefixtures("one_thread")
PRODUCTS = {"tensorrt_10": "tensorrt", "tensorrt_11": "tensorrt", "tensorrt_rtx_1": "tensorrt-rtx"}
PARTS = ("embed", "vision", "text")
BUILD = """\
version: 1
model: scout
modalities: [text, image]
output: bundles
targets: [{name: card, backend: tensorrt-rtx, profile: fp32, context: 1024, batch: 2, gpu: rtx-3090}]
calibration: {samples: 4}
parity: {cases: {samples: 2}, thresholds: {task_accuracy_drop: 1.0}}
"""
CONTEXT, BATCH, CHUNK = 48, 2, 16
CAPABILITY = 89
ROOM = MemoryBudget(1 << 30)


class Lowered:
    """A toy's graphs, traced once, and lowered once for each backend and profile."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.config, self.checkpoint = ModelConfig.load(model), Checkpoint.open(model)
        self.reference = TorchBackend.of(load_reference(model))
        self.folder, self.made = folder, set[Path]()
        self.graphs = {
            part: getattr(trace, f"trace_{part}")(self.config, self.checkpoint, folder / part / f"{part}.onnx")
            for part in PARTS
        }

    def lower(self, backend: str, profile: str) -> Path:
        folder = self.folder / f"{backend}-{profile}"
        if folder not in self.made:
            lowering: Any = import_module(f"arriero.graphs.lower.{TRAITS[backend].module}")
            schemes = load_profile(profile).rtn_baseline().assign(self.checkpoint.tensors)
            for part in PARTS:
                lowering.lower(part, self.graphs[part], Lowering(self.config, self.checkpoint, schemes, folder))
            self.made.add(folder)
        return folder


class Bench:
    """A lowered toy, and the stand-ins that compile and run it."""

    def __init__(self, product: str, lowered: Lowered, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.product, self.backend, self.lowered = product, PRODUCTS[product], lowered
        self.reference = lowered.reference
        self.cuda = FakeCuda()
        self.trt = FakeTensorRt(product, self.cuda, self.reference.model)
        self.building = Building(self.trt)
        self.folder, self.monkeypatch = folder / "bundle", monkeypatch

    def lower(self, profile: str) -> None:
        shutil.copytree(self.lowered.lower(self.backend, profile), self.folder)

    def compile(self, parts: tuple[str, ...] = PARTS, room: MemoryBudget = ROOM) -> Any:
        from arriero.export.compile import tensorrt as compiler
        from arriero.export.compile.nvidia import tensorrt_api
        from arriero.export.compile.nvidia.engine_shapes import Limits
        from arriero.export.compile.nvidia.gpus import Gpu

        self.monkeypatch.setattr(tensorrt_api, "local_gpus", lambda: (Gpu(CAPABILITY),))
        api = tensorrt_api.Api(self.backend, self.trt.module)
        reports: list[tuple[str, int, int]] = []
        limits = Limits(context=CONTEXT, batch=BATCH, chunk=CHUNK)
        device = Device(gpu=Gpu(CAPABILITY), limits=limits, memory=room)
        made = compiler.compile_graphs(
            self.folder, parts, device, lambda step, done, total, _: reports.append((step, done, total)), api=api
        )
        for part in parts:
            steps = [done for step, done, _ in reports if step == f"compile {part}"]
            assert steps == sorted(set(steps))
            assert steps[-1] == reports[-1][2]
        return made

    def open(self) -> TensorRtBackend:
        product = self.trt.install(self.monkeypatch, self.folder / "cache")
        return TensorRtBackend(self.folder, self.reference.spec, product)


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    folder = tmp_path_factory.mktemp("contract")
    return Lowered(make_scout_toy(folder / "scout", 3), folder / "lowered")


@pytest.fixture(params=PRODUCTS)
def bench(request: pytest.FixtureRequest, lowered: Lowered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(request.param, lowered, tmp_path, monkeypatch)


def run(backend: Any, ids: np.ndarray, pieces: list[int]) -> tuple[list[np.ndarray], Any]:
    cache, at, logits = backend.new_cache(1, CONTEXT), 0, []
    for count in pieces:
        embeds = backend.embed(ids[:, at : at + count], np.zeros((0, backend.spec.hidden_size), np.float32))
        positions = np.arange(at, at + count)[None]
        step = backend.forward(embeds, positions, cache, np.array([count - 1]), captures=at == 0)
        logits.append(step.logits)
        at += count
    return logits, step


def test_what_is_compiled_is_what_the_runtime_loads_and_runs(bench):
    bench.lower("fp32")
    made = bench.compile()
    assert (made.gpu, made.tools) == (f"sm_{CAPABILITY}", {bench.backend: bench.trt.recorder.version})
    assert {path.name for path in bench.folder.glob("*.engine")} == {f"{part}.engine" for part in PARTS}
    backend = bench.open()
    ids = np.random.default_rng(0).integers(3, 150, (1, 40))
    pieces = [16, 9, 1, 1, 1, 1]
    ours, theirs = (run(side, ids, pieces)[0] for side in (backend, bench.reference))
    for found, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    tiles = np.random.default_rng(1).standard_normal((5, 3, 32, 32)).astype(np.float32)
    np.testing.assert_allclose(backend.vision(tiles), bench.reference.vision(tiles), rtol=1e-4, atol=1e-4)
    assert bench.cuda.launches > 0
    backend.close()
    assert bench.cuda.held == {"memory": 0, "pinned": 0, "handles": 0}
    assert bench.cuda.faults == []


def test_weights_without_room_are_streamed_by_the_text_engine_alone(bench):
    bench.lower("fp32")
    bench.compile(room=MemoryBudget(1 << 20, 1 << 20))
    others = sum((bench.folder / f"{part}.engine").stat().st_size for part in PARTS if part != "text")
    told = {part: json.loads((bench.folder / f"{part}.json").read_text()).get("weights_on_gpu") for part in PARTS}
    assert told == {"embed": None, "vision": None, "text": (1 << 20) - others}
    flags = [call.arguments["flag"].name for call in bench.trt.recorder.named("IBuilderConfig.set_flag")]
    assert flags == ["WEIGHT_STREAMING"]
    bench.trt.streamable = 1 << 30
    bench.open()
    kept = bench.trt.recorder.named("ICudaEngine.weight_streaming_budget_v2=")
    assert [call.arguments["value"] for call in kept] == [told["text"]]


def test_narrow_profiles_keep_their_cache_narrow(bench):
    bench.lower("fp16")
    bench.compile()
    backend = bench.open()
    assert {backend._text.signature.inputs[f"past_key.{layer}"].dtype for layer in range(4)} == {"FLOAT16"}
    ids = np.random.default_rng(0).integers(3, 150, (1, 12))
    ours, theirs = (run(side, ids, [8, 1, 1])[0] for side in (backend, bench.reference))
    apart = max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(ours, theirs, strict=True))
    assert 0 < apart < 2e-2  # the cache's rounding: the plan behind computes in float32


def test_what_the_parser_or_the_builder_refuses_is_told(bench):
    bench.lower("fp32")
    bench.building.refuse["builder"] = "Could not find any implementation for node layers.0.odd"
    with pytest.raises(ArrieroError, match="Could not find any implementation"):
        bench.compile(("embed",))
    bench.building.refuse["parser"] = "Plugin not found, are the plugin name, version, and namespace correct?"
    with pytest.raises(ArrieroError, match=r"embed\.onnx: node layers\.0\.odd \(Odd\): .*Plugin not found"):
        bench.compile(("embed",))


@pytest.fixture(scope="module")
def scout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_scout(tmp_path_factory.mktemp("build") / "scout")


def test_the_command_builds_a_bundle_proves_it_and_asks_it(scout, tmp_path, monkeypatch):
    from arriero.export.compile import tensorrt as compiler
    from arriero.export.compile import tensorrt_rtx as rtx_compiler
    from arriero.export.compile.nvidia import gpus, tensorrt_api
    from arriero.export.pipeline import target_build

    here = gpus.Gpu(86)
    gpu = FakeCuda(arch=(8, 6))
    trt = FakeTensorRt("tensorrt_rtx_1", gpu, TorchBackend(scout).model)
    Building(trt)
    for module in (target_build, gpus, tensorrt_api):
        monkeypatch.setattr(module, "local_gpus", lambda: (here,))
    for module in (compiler, rtx_compiler):
        monkeypatch.setattr(module, "load", lambda name: tensorrt_api.Api(name, trt.module))
    trt.install(monkeypatch, tmp_path / "cache")

    (tmp_path / "scout").symlink_to(scout)
    (tmp_path / "build.yaml").write_text(BUILD)
    built = arriero("build", tmp_path / "build.yaml")
    assert built.code == 0, built.err
    bundle = tmp_path / "bundles" / "card"
    rows = {row["metric"]: row["value"] for row in json.loads((bundle / "parity.json").read_text())["rows"]}
    assert rows["router_agreement"] == rows["same_top_token"] == 1.0
    assert rows["logits_max_abs_error"] < 1e-4

    asked = arriero("run", bundle, "What is 17 + 25?", "--max-tokens", "4")
    assert asked.code == 0, asked.err
    assert gpu.held == {"memory": 0, "pinned": 0, "handles": 0}
    assert gpu.faults == []

    gpu.arch = (8, 9)
    refused = arriero("run", bundle, "What is 17 + 25?")
    assert refused.code == 3
    assert "the engines were built for sm_86 and this machine's GPU is sm_89" in " ".join(refused.err.split())
