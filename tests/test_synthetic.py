"""A synthetic model built end to end on both CPU backends: proven like any other, and marked wherever it is shown."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from arriero.runtimes.manifest import Manifest, Source
from tests.command import arriero
from tests.narrow import add_narrow

BUILD = """version: 1
model: synthetic://{name}?layers=2&seed=3
adapters: [support-lora]
modalities: [text]
targets:
  - {{name: onnxruntime, backend: onnxruntime, profile: int8, context: 1024}}
  - {{name: tvm, backend: tvm, profile: int8, context: 1024}}
calibration: {{samples: 4}}
parity: {{cases: {{samples: 4}}}}
"""
URL = "synthetic://narrow-scout?layers=2&seed=3"


def write_adapter(folder: Path) -> None:
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    module = "base_model.model.language_model.model.layers.0.self_attn.q_proj"
    draw = np.random.default_rng(4)
    factors = {
        f"{module}.lora_{side}.weight": draw.normal(size=shape).astype(np.float32) / 16
        for side, shape in (("A", (2, 256)), ("B", (256, 2)))
    }
    save_file(factors, folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("tvm", reason="needs apache-tvm: pip install 'arriero[tvm]'")
    folder = tmp_path_factory.mktemp("synthetic")
    with pytest.MonkeyPatch.context() as patch:
        name = add_narrow(patch, "scout", vocab_size=2048)
        write_adapter(folder / "support-lora")
        (folder / "build.yaml").write_text(BUILD.format(name=name))
        done = arriero("build", folder / "build.yaml")
        assert done.code == 0, done.err + done.out
        yield folder


@pytest.mark.parametrize("backend", ["onnxruntime", "tvm"])
def test_its_bundle_says_that_it_is_synthetic(folder, backend):
    bundle = folder / "bundles" / backend
    assert Manifest.read(bundle).source == Source(URL, "synthetic", ("support-lora",), True)
    inspected = arriero("inspect", bundle)
    assert f"synthetic weights, drawn by {URL}" in " ".join(inspected.out.split())
    asked = arriero("run", bundle, "What is 17 + 25?", "--max-tokens", "2")
    assert (asked.code, f"synthetic weights, drawn by {URL}" in asked.err) == (0, True)
    shown = arriero("parity", bundle, "--recorded")
    assert "The weights are synthetic" in shown.out
    assert "synthetic" in (bundle / "parity.html").read_text()


def test_it_is_measured_against_its_url(folder):
    bundle = folder / "bundles" / "onnxruntime"
    adapter = ("--adapter", folder / "support-lora")
    told = arriero("parity", bundle, "--against", URL, *adapter, "--samples", "2", "--json")
    assert told.json["labels"]["checkpoint"].startswith(f"synthetic weights, drawn by {URL}")
    refused = arriero("parity", bundle, "--against", URL.replace("seed=3", "seed=4"), *adapter)
    assert (refused.code, "was not made from this checkpoint" in refused.err) == (2, True)
