"""Lowering, compiling and running through the recorded calls of each TensorRT: a contract test, no GPU and no TensorRT.

The compiler builds over a recorder; the plans that it writes are run by the backend over the same version's recorder,
with the PyTorch reference behind them. So names, types, shapes and profiles have to agree from graph to session.
"""

from __future__ import annotations

import inspect
import shutil
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arriero.errors import ArrieroError
from arriero.graphs import trace
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.config import ModelConfig
from arriero.profiles.recipe import load_profile
from arriero.runtimes import products, tensorrt, tensorrt_rtx
from arriero.runtimes.backend import module_of
from arriero.runtimes.tensorrt import TensorRtBackend
from arriero.runtimes.torch import TorchBackend
from tests.tensorrt.fake_builder import Building
from tests.tensorrt.fake_cuda import FakeCuda
from tests.tensorrt.fake_engine import FakeTensorRt
from tests.toys import load_reference, make_scout_toy

if find_spec("arriero.export.compile.tensorrt") is None:
    pytest.skip("needs the compiler arriero.export.compile.tensorrt", allow_module_level=True)

PRODUCTS = {"tensorrt_10": "tensorrt", "tensorrt_11": "tensorrt", "tensorrt_rtx_1": "tensorrt-rtx"}
PARTS = ("embed", "vision", "text")
CONTEXT, BATCH, CHUNK = 48, 2, 16
CAPABILITY = 89


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
            lowering: Any = import_module(f"arriero.graphs.lower.{module_of(backend)}")
            schemes = load_profile(profile).naive().assign(self.checkpoint.tensors)
            # the GPU decides the form of the experts, where the product has several
            takes = inspect.signature(lowering.lower).parameters
            gpu = {"capability": CAPABILITY} if "capability" in takes else {}
            for part in PARTS:
                lowering.lower(part, self.graphs[part], self.config, self.checkpoint, schemes, folder, **gpu)
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

    def compile(self, parts: tuple[str, ...] = PARTS) -> Any:
        from arriero.export.compile import tensorrt as compiler
        from arriero.export.compile import tensorrt_api
        from arriero.export.compile.engine_shapes import Limits
        from arriero.export.compile.gpus import Gpu

        self.monkeypatch.setattr(tensorrt_api, "local_gpus", lambda: (Gpu(CAPABILITY),))
        api = tensorrt_api.Api(self.backend, self.trt.module)
        told: list[tuple[int, int]] = []
        limits = Limits(context=CONTEXT, batch=BATCH, chunk=CHUNK)
        made = compiler.compile_graphs(
            self.folder, parts, Gpu(CAPABILITY), limits, lambda *now: told.append(now), memory=1 << 30, api=api
        )
        assert told == sorted(told)
        assert told[-1][0] == told[-1][1]
        return made

    def open(self) -> TensorRtBackend:
        product = tensorrt_rtx.PRODUCT if "rtx" in self.product else tensorrt.PRODUCT
        self.monkeypatch.setenv("XDG_CACHE_HOME", str(self.folder / "cache"))
        modules = dict.fromkeys(product.modules, self.trt.module)
        self.monkeypatch.setattr(products, "import_module", modules.__getitem__)
        self.monkeypatch.setattr(tensorrt, "load_cuda", lambda extra: self.cuda.runtime)
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
        step = backend.forward(embeds, positions, cache, np.array([count - 1]), taps=at == 0)
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
