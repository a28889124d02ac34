"""The benchmark of a TensorRT bundle over stand-ins: what it compares and tells. No speed is measured here."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from arriero.runtimes.nvidia.engine_context import Context
from tests.runtimes.nvidia.conftest import bench, references

__all__ = ["bench", "references"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def runtime(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("gpu_runtime")


def test_graphs_and_growth_change_nothing(bench, runtime):
    one = bench("tensorrt_11", "maverick")
    backend = one.open()
    report = runtime.compare(backend, 40)
    assert report["slots"] == [32, 40]
    assert report["slots_without_growth"] == [40]
    assert one.cuda.captures == 2 + 1  # one per size of the cache; none where there are to be none
    for name in ("graphs", "no graphs", "no growth"):
        assert report[name]["largest_difference"] < 1e-5
        assert report[name]["same_first_choice"] == 1
        assert report[name]["microseconds"] > 0
    backend.close()


def test_a_graph_that_computes_something_else_is_told(bench, runtime, monkeypatch):
    backend = bench("tensorrt_11", "maverick").open()
    run = Context.run

    def wrong(self, feeds, bindings, requested, record):
        results = run(self, feeds, bindings, requested, record)
        return {name: array + record for name, array in results.items()} if "logits" in results else results

    monkeypatch.setattr(Context, "run", wrong)
    assert runtime.compare(backend, 30)["no graphs"]["largest_difference"] == pytest.approx(1, abs=1e-3)
    backend.close()


def test_the_layers_of_our_plugins_are_told_with_their_tactics(runtime):
    layers = [
        {"Name": "MatMul_3", "LayerType": "gemm", "TacticValue": "0x9"},
        {"Name": "ExpertDown_7 [profile 1]", "LayerType": "PluginV3", "TacticValue": "0x2", "Inputs": []},
        "ForeignNode",
    ]
    assert runtime.expert_layers(json.dumps({"Layers": layers})) == [
        {"Name": "ExpertDown_7 [profile 1]", "TacticValue": "0x2"}
    ]
