"""What a plan says of bundles is what builds then write; memory is compared by `benchmarks/plan_accuracy.py`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from arriero.export.build_file.read import load_build
from arriero.export.pipeline.plan import make_plan
from tests.command import arriero, write_build
from tests.small import small_maverick, small_scout

ROOT = Path(__file__).parents[3]
WEIGHTS = (".safetensors", ".bin")


def check_figures(build_file: Path) -> None:
    """Hold the plan's bytes of weights and cache, and of disk for what stages leave, against the finished build's."""
    build = load_build(build_file)
    plan = make_plan(build)
    disk = {stage.name: (stage.disk, stage.key) for stage in plan.stages}
    for target in plan.targets:
        manifest = json.loads((build.output / target.name / "manifest.json").read_text())
        files = manifest["files"]
        written = sum(entry["bytes"] for name, entry in files.items() if name.endswith(WEIGHTS))
        assert target.weights_bytes == pytest.approx(written, rel=0.15), target.name
        chunk = plan.model["chunk"]
        slots = {"chunked": min(target.context, chunk), "global": target.context}
        kinds = [layer["attention"] for layer in manifest["model"]["text"]["layers"]]
        cache = target.batch * sum(manifest["kv_bytes_per_token"][kind] * slots[kind] for kind in kinds)
        assert target.kv_bytes == cache
    for name, (planned, key) in disk.items():
        if not name.startswith(("calibrate", "reference", "rtn-")):  # which delete most of what they write
            stage = json.loads((build.output / ".work" / f"{name}-{key}" / "stage.json").read_text())
            taken = sum(entry["bytes"] for entry in stage["files"].values())
            assert planned == pytest.approx(taken, rel=0.15, abs=192 << 10), name


def test_figures_of_onnxruntime_bundles(workshop):
    check_figures(workshop / "build.yaml")


def test_figures_of_tvm_bundles(tvm_workshop):
    """Quantised matrices count at their bits, whatever the checkpoint's dtype is."""
    check_figures(tvm_workshop / "build.yaml")


@pytest.mark.parametrize("shape", ["maverick", "dense"])
def test_figures_of_other_shapes(tmp_path, shape):
    if shape == "maverick":
        small_maverick(tmp_path / "model")
    else:
        small_scout(tmp_path / "model", vision=False, moe_layers=[])
    profiles = ("fp32", "int8-all")
    drop = "task_accuracy_forced_drop: 1.0"
    thresholds = f"{{{drop}}}" if shape == "dense" else f"{{router_agreement: 0.5, {drop}}}"
    build_file = write_build(
        tmp_path / "build.yaml", Path("model"), "text", profiles=profiles, samples=3, thresholds=thresholds
    )
    built = arriero("build", build_file)
    assert built.code == 0, built.err
    check_figures(build_file)


def test_a_baselines_weights_are_gone_before_the_bundles_are_written(tmp_path):
    """So they take disk besides only where the bundle's own are there already, of a build with other cases, say."""
    build_file = write_build(tmp_path / "build.yaml", ROOT / "models" / "chasqui", "text", ("int4",), samples=3)
    plan = make_plan(load_build(build_file))
    disk = {stage.name: stage.disk for stage in plan.stages}
    assert disk["rtn-int4"] == pytest.approx(disk["lower-int4"], rel=0.15)
    assert disk["rtn-int4"] > plan.targets[0].weights_bytes
    every = sum(disk.values()) + plan.targets[0].copied
    assert plan.disk == every - min(disk["rtn-int4"], disk["lower-int4"])
    stages = tuple(replace(stage, done=stage.name == "lower-int4") for stage in plan.stages)
    assert replace(plan, stages=stages).disk == every - disk["lower-int4"]
