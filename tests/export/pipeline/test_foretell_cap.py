"""What a plan foretells of bundles under a cap on memory, against shapes, bundles and the formula in plain numbers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from arriero.errors import ArrieroError
from arriero.export.machine.read_speed import ReadSpeed
from arriero.export.pipeline.foretell_cap import KERNEL_SHARE, StoredWeights, foretell, trace_rates, uniform_rates
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.sources.synthetic import SyntheticModel
from arriero.profiles.recipe import load_profile
from arriero.runtimes.backend import MemoryCap
from arriero.traits import TRAITS
from tests.command import arriero, write_build

GIB = 1 << 30
SPEED = ReadSpeed(memory=50e9, drive=5e9, buffered=None)


@pytest.fixture(scope="module")
def maverick():
    """Maverick's config and the weights of its int4 bundle, from shapes alone."""
    checkpoint = Checkpoint.open(SyntheticModel.parse("synthetic://maverick"))
    config = checkpoint.model_config()
    used = [info for info in checkpoint.tensors.values() if info.name.startswith("language_model.")]
    return config, StoredWeights.of(config.text, used, load_profile("int4").rtn_baseline(), TRAITS["tvm"])


def test_mavericks_records_are_of_the_size_that_its_shapes_say(maverick):
    _, weights = maverick
    assert len(weights.records) == 24
    codes, scales = 3 * 5120 * 8192 // 2, 3 * 5120 * 8192 // 32 * 4
    assert min(weights.records) >= codes
    assert max(weights.records) <= codes + scales + 4096
    assert 128 * sum(weights.records) > 190e9


def test_tokens_per_second_are_bytes_over_speeds(maverick):
    config, weights = maverick
    rates = uniform_rates(config.text)
    fit = foretell("fits", MemoryCap(400 * GIB, 4096, 1), weights, config, rates, SPEED, 4)
    assert (fit.slots, fit.hit_rate, fit.read_per_token) == (128, 1.0, 0.0)
    seconds = (weights.core + sum(weights.records)) / (KERNEL_SHARE * SPEED.memory)
    assert fit.tokens_per_second == pytest.approx(1 / seconds)
    half = foretell("half", MemoryCap(64 * GIB, 4096, 1), weights, config, rates, SPEED, 4)
    assert 0.1 < half.hit_rate < 0.5
    assert half.hit_rate == pytest.approx(half.slots / 128, abs=1 / 128)
    assert half.read_per_token == pytest.approx((1 - half.hit_rate) * sum(weights.records), rel=0.02)
    shared = (1 - half.hit_rate) * sum(weights.shared) / (KERNEL_SHARE * SPEED.memory)
    waited = half.read_per_token / SPEED.drive - shared
    assert 1 / half.tokens_per_second == pytest.approx(seconds + waited, rel=0.02)
    deep = MemoryCap(64 * GIB, 1 << 20, 1)
    wide, narrow = (foretell("deep", deep, weights, config, rates, SPEED, size) for size in (4, 1))
    assert wide.refused is not None  # 48 GiB of keys and values
    assert narrow.slots > 1
    slower = foretell("slow", MemoryCap(64 * GIB, 4096, 1), weights, config, rates, replace(SPEED, drive=1e9), 4)
    assert slower.tokens_per_second < half.tokens_per_second


def test_a_cap_below_the_core_is_refused_in_the_plan_too(maverick):
    config, weights = maverick
    small = foretell("small", MemoryCap(4 * GIB, 4096, 1), weights, config, uniform_rates(config.text), SPEED, 4)
    assert "too small for the bundle; expected at least" in str(small.refused)
    assert small.tokens_per_second == 0.0


def test_what_calibration_has_yet_to_choose_takes_its_budget(maverick):
    profile, text = load_profile("mixed"), maverick[0].text
    tensors = Checkpoint.open(SyntheticModel.parse("synthetic://maverick")).tensors
    used = [info for name, info in tensors.items() if name.startswith("language_model.")]
    weights = StoredWeights.of(text, used, profile, TRAITS["tvm"])
    numbers = 3 * text.hidden_size * text.expert_ffn
    (record,) = set(weights.records)
    assert record == pytest.approx(2 * profile.choose.budget * numbers, abs=4096)


def test_a_trace_of_another_model_is_refused(maverick, tmp_path):
    file = tmp_path / "trace.jsonl"
    file.write_text(json.dumps({"prompt": 0, "token": 0, "answer": True, "layer": 3, "experts": [5]}) + "\n")
    with pytest.raises(ArrieroError, match=r"whose layers 3 have experts; expected 1, 3, 5"):
        trace_rates(maverick[0].text, file)


def test_the_sizes_are_those_of_the_bundle(tvm_workshop, workshop):
    checkpoint = Checkpoint.open(workshop / "scout")
    config = checkpoint.model_config()
    for name, profile in (("fp32", "fp32"), ("int8", str(workshop / "int8.yaml"))):
        signature = json.loads((tvm_workshop / "bundles" / name / "text.json").read_text())
        used = [info for info in checkpoint.tensors.values() if info.name.startswith("language_model.")]
        weights = StoredWeights.of(config.text, used, load_profile(profile), TRAITS["tvm"])
        assert list(weights.records) == [entry["bytes"] for entry in signature["experts"]]


def test_the_command_foretells_targets_that_keep_to_a_cap(workshop, tmp_path):
    trace = tmp_path / "trace.jsonl"
    bundle = workshop / "bundles" / "fp32"
    assert arriero("trace", bundle, "What is 17 + 25?", "--output", trace, "--max-tokens", 8).code == 0
    file = write_build(tmp_path / "build.yaml", workshop / "scout", profiles=("fp32",), samples=8, backend="tvm")
    planned = arriero("plan", file, "--memory", "2GiB", "--trace", trace, "--json")
    assert planned.code == 0, planned.err
    (target,) = planned.json["capped"]
    assert target["name"] == "fp32"
    assert (target["slots"], target["refused"]) == (target["of"], None)
    assert target["tokens_per_second"] > 0
    assert planned.json["read_speed"]["drive"] > 0
    shown = arriero("plan", file, "--memory", "2MiB")
    assert "fp32: a memory of 2 MiB is too small" in " ".join(shown.out.split())
    refused = arriero("plan", file, "--trace", trace)
    assert (refused.code, "Add --memory" in refused.err) == (2, True)
    other = arriero("plan", workshop / "build.yaml", "--memory", "2GiB")
    assert other.code == 2
    assert "onnxruntime: it copies every weight" in " ".join(other.err.split())
