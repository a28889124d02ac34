"""Bundles of the TensorRT backends, whole: what is refused before anything is loaded, and answers through a session.

Over recorded modules and a stand-in for the GPU: a contract test, not a run on a GPU.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import arriero
from arriero.errors import ArrieroError, MachineLacks
from arriero.export.pipeline.bundle import copy_tokenizer
from arriero.export.proof.reference import TorchBackend
from arriero.runtimes import tensorrt, tensorrt_rtx
from arriero.runtimes.manifest import REPORTS
from arriero.runtimes.nvidia import products
from arriero.runtimes.processor.processor import Processor
from arriero.runtimes.session import Session
from tests.runtimes.conftest import write_manifest
from tests.small import CONTEXT, TILE, small_scout
from tests.tensorrt.fake_cuda import FakeCuda
from tests.tensorrt.fake_engine import FakeTensorRt, signature, write_engine

pytestmark = pytest.mark.usefixtures("one_thread")
PRODUCTS = {"tensorrt_10": tensorrt.PRODUCT, "tensorrt_11": tensorrt.PRODUCT, "tensorrt_rtx_1": tensorrt_rtx.PRODUCT}
VERSIONS = {"tensorrt_10": "10.16.1.11", "tensorrt_11": "11.4.0.106", "tensorrt_rtx_1": "1.7.1.116"}
GPU = (8, 9)


@pytest.fixture(scope="module")
def scout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_scout(tmp_path_factory.mktemp("gpu") / "scout")


@pytest.fixture(scope="module")
def reference(scout: Path) -> TorchBackend:
    return TorchBackend(scout)


@pytest.fixture
def folder(scout: Path, reference: TorchBackend, tmp_path: Path) -> Path:
    """A bundle's files, without a manifest."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    copy_tokenizer(scout, folder / "tokenizer")
    for part in ("embed", "vision", "text"):
        write_engine(folder, part, signature(reference.model, part, 2, CONTEXT, fixed=True))
    for report in REPORTS:
        (folder / report).write_text("{}")
    return folder


@pytest.fixture
def machine(reference: TorchBackend, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory):
    """Make this machine one with a GPU and a product; gives the stand-ins."""

    cache = tmp_path_factory.mktemp("cache")

    def set_up(product: str, arch: tuple[int, int] = GPU) -> tuple[FakeCuda, FakeTensorRt]:
        gpu = FakeCuda(arch=arch)
        trt = FakeTensorRt(product, gpu, reference.model)
        trt.install(monkeypatch, cache)
        return gpu, trt

    return set_up


def manifest(folder: Path, reference: TorchBackend, product: str, **changes: Any) -> None:
    """Write the manifest of a bundle for `product`; `changes` are of its target, and of `tools`."""
    backend = PRODUCTS[product].backend
    tools = changes.pop("tools", {backend: VERSIONS[product]})
    target = {
        "name": "gpu",
        "backend": backend,
        "profile": "fp16",
        "context": CONTEXT,
        "batch": 2,
        "arch": "any",
        "kv_cache": "float32",
        "gpu": "sm_89",
        "plugins": {},
        "shard": 4 << 30,
    }
    write_manifest(folder, model=reference.spec.entry(), target=target | changes, tools=tools)


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_session_answers_as_the_reference(folder, scout, reference, machine, product):
    gpu, _ = machine(product)
    manifest(folder, reference, product)
    theirs = Session(reference, Processor(scout, reference.spec), CONTEXT, 2)
    image = np.random.default_rng(3).integers(0, 255, (TILE, TILE, 3), np.uint8)
    with arriero.load(folder) as ours:
        for images in (None, image):
            found, expected = (
                session.generate("What is 17 + 25?", images, max_tokens=20, seed=1, temperature=0.5)
                for session in (ours, theirs)
            )
            assert found.token_ids == expected.token_ids
        prompts = ["one", "and another that is longer"]
        found_all, expected_all = (session.generate_batch(prompts, max_tokens=12) for session in (ours, theirs))
        assert [one.token_ids for one in found_all] == [one.token_ids for one in expected_all]
        assert gpu.launches > 20
    assert gpu.held == {"memory": 0, "pinned": 0, "handles": 0}
    assert gpu.faults == []


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("arch", [(8, 7), (12, 0)])
def test_another_gpu_is_refused_before_anything_is_loaded(folder, reference, machine, product, arch):
    gpu, trt = machine(product, arch)
    manifest(folder, reference, product)
    name = f"sm_{arch[0]}{arch[1]}"
    with pytest.raises(
        MachineLacks, match=rf"built for sm_89 and this machine's GPU is {name}.*`gpu: {name}`"
    ) as caught:
        arriero.load(folder)
    assert str(caught.value).startswith(f"{folder}/manifest.json:target.gpu: ")
    assert trt.recorder.calls == []
    assert gpu.held == {"memory": 0, "pinned": 0, "handles": 0}


@pytest.mark.parametrize(
    ("product", "built", "remedy"),
    [
        (
            "tensorrt_11",
            "10.16.1.11",
            r"TensorRT 10\.16\.1 and 11\.4\.0\.106 is installed\. Install `tensorrt==10\.16\.1\.\*`",
        ),
        ("tensorrt_10", "10.16.0.72", r"with TensorRT 10\.16\.0 and 10\.16\.1\.11 is installed"),
        ("tensorrt_rtx_1", "1.6.1.120", r"for RTX 1\.6\.1 and 1\.7\.1\.116 is installed\. Install `tensorrt_rtx==1\.6"),
    ],
)
def test_another_version_is_refused_before_anything_is_loaded(folder, reference, machine, product, built, remedy):
    gpu, trt = machine(product)
    manifest(folder, reference, product, tools={PRODUCTS[product].backend: built})
    with pytest.raises(MachineLacks, match=remedy):
        arriero.load(folder)
    assert trt.recorder.calls == gpu.recorder.calls == []


def test_another_build_of_the_same_release_is_taken(folder, reference, machine):
    machine("tensorrt_11")
    manifest(folder, reference, "tensorrt_11", tools={"tensorrt": "11.4.0.99"})
    arriero.load(folder).close()


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"gpu": None}, r"target\.gpu"),
        ({"tools": {}}, "manifest.json:tools"),
        ({"tools": {"tensorrt-rtx": "1"}}, "tools"),
    ],
)
def test_a_manifest_that_does_not_say_what_it_was_built_for(folder, reference, machine, changes, where):
    machine("tensorrt_11")
    manifest(folder, reference, "tensorrt_11", **changes)
    with pytest.raises(ArrieroError, match=rf"{where}: the manifest does not say which TensorRT and which GPU"):
        arriero.load(folder)


def test_a_plugins_entry_of_another_shape_is_refused(folder, reference, machine):
    machine("tensorrt_11")
    manifest(folder, reference, "tensorrt_11", plugins=["expert_down"])
    with pytest.raises(ArrieroError, match=r"manifest\.json:target\.plugins: an entry has the wrong shape"):
        arriero.load(folder)


@pytest.mark.parametrize(
    ("inside", "told", "expected"),
    [
        ({"expert_down": "a" * 64}, {"expert_down": "a" * 64}, None),
        ({"expert_down": "a" * 64}, {"expert_down": "b" * 64}, r"expected bbbbbbbbbbbb\.\."),
        ({"expert_down": "a" * 64}, {}, "expected none of that name"),
    ],
)
def test_engines_with_other_kernels_than_the_manifests_are_refused(folder, reference, machine, inside, told, expected):
    gpu, trt = machine("tensorrt_11")
    described = json.loads((folder / "text.json").read_text())
    (folder / "text.json").write_text(json.dumps(described | {"plugins": inside}))
    manifest(folder, reference, "tensorrt_11", plugins=told)
    if expected is None:
        arriero.load(folder).close()
        return
    with pytest.raises(
        ArrieroError, match=rf"text\.json:plugins: the engine holds the kernel expert_down a.*{expected}"
    ):
        arriero.load(folder)
    assert trt.recorder.calls == gpu.recorder.calls == []


def test_a_machine_without_the_product_is_told_what_to_install(folder, reference, monkeypatch):
    def absent(name: str):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(products, "import_module", absent)
    manifest(folder, reference, "tensorrt_11")
    with pytest.raises(MachineLacks, match=r"TensorRT is not installed.*pip install 'arriero\[tensorrt\]'") as caught:
        arriero.load(folder)
    assert caught.value.exit_code == 3
