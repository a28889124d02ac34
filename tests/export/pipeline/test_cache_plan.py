"""How keys and values are kept: what a target asks for, and what it gets where it asks for nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from arriero.export.pipeline.cache_plan import kv_bytes
from arriero.export.pipeline.plan import make_plan
from arriero.export.pipeline.target_thresholds import thresholds
from arriero.graphs.config import ModelConfig
from arriero.profiles.recipe import load_profile
from tests.export.pipeline.test_plan import BUILD, load
from tests.toys import make_scout_toy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("caches")
    make_scout_toy(folder / "model", seed=3)
    return folder


def test_a_float16_cache_is_a_half_and_needs_no_calibration(folder: Path) -> None:
    texts = [BUILD.replace("profile: fp32", f"profile: fp32, kv_cache: {cache}") for cache in ("float32", "float16")]
    exact, half = (make_plan(load(folder, text.replace("backend: onnxruntime", "backend: tvm"))) for text in texts)
    assert half.targets[1].kv_bytes * 2 == exact.targets[1].kv_bytes
    assert half.targets[1].kv_cache == "float16"
    assert {one.name for one in half.stages} == {one.name for one in exact.stages}


@pytest.mark.parametrize(
    ("backend", "profile", "kept"),
    [
        ("tvm", "int8", "float16"),
        ("tvm", "int8-all", "float16"),
        ("tvm", "fp32", "float32"),
        ("onnxruntime", "int8", "float32"),
    ],
)
def test_rounded_weights_have_a_float16_cache_where_there_is_one_within_their_own_thresholds(
    folder: Path, backend: str, profile: str, kept: str
) -> None:
    text = BUILD.replace("backend: onnxruntime, profile: fp32", f"backend: {backend}, profile: {profile}")
    plain, asked = (load(folder, text.replace("context: 256", more)) for more in ("context: 256", f"kv_cache: {kept}"))
    target = make_plan(plain).targets[1]
    assert target.kv_cache == kept
    assert target.kv_bytes == kv_bytes(ModelConfig.load(folder / "model").text, 256, 2 if kept == "float16" else 4)
    own = load_profile(profile)
    assert thresholds(plain, plain.targets[1], own) == own.thresholds
    assert (thresholds(asked, asked.targets[1], own) == own.thresholds) == (kept == "float32")
