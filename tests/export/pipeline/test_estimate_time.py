"""Estimated times: for every stage that is to be done, growing with what it goes over, measured in a moment."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from arriero.export.build_file.read import load_build
from arriero.export.machine.speed import MachineSpeed, measure_speed
from arriero.export.pipeline import plan as planning
from arriero.export.pipeline.estimate_time import TOOLS
from arriero.export.pipeline.plan import make_plan
from tests.toys import make_scout_toy

BUILD = """\
version: 1
model: model
modalities: [text]
output: out
targets:
  - {name: small, backend: onnxruntime, profile: PROFILE, context: 128}
calibration: {samples: 12}
parity: {cases: {samples: CASES}}
"""
SLOW = MachineSpeed(flops=1e6, copied=1e6, hashed=1e6)  # so slow that arithmetic is all there is


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("build")
    make_scout_toy(folder / "model", seed=3, vision=False)
    return folder


def seconds(folder: Path, profile: str = "int8", cases: int = 10, parity: str = "") -> dict[str, float]:
    text = BUILD.replace("PROFILE", profile).replace("CASES", str(cases)).replace("parity: {", f"parity: {{{parity}")
    (folder / "build.yaml").write_text(text)
    plan = make_plan(load_build(folder / "build.yaml"))
    assert plan.seconds == pytest.approx(sum(stage.seconds or 0.0 for stage in plan.stages))
    assert plan.to_json()["seconds"] == plan.seconds
    return {stage.name: stage.seconds or 0.0 for stage in plan.stages}


def test_every_stage_to_be_done_has_a_time(folder: Path) -> None:
    assert all(value > 0 for value in seconds(folder).values())


def test_more_cases_and_a_slower_machine_take_longer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = seconds(folder)
    monkeypatch.setattr(planning, "measure_speed", lambda: SLOW)
    slow, more = seconds(folder), seconds(folder, cases=40)
    assert all(slow[name] > fast[name] for name in fast if name != "graph")
    assert {name for name in slow if more[name] > slow[name]} == {"reference", "parity-small"}


def test_a_proof_with_forced_routing_goes_over_its_cases_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "measure_speed", lambda: SLOW)
    once, twice = seconds(folder), seconds(folder, parity="answers: forced, forced_routing: true, ")
    plain = seconds(folder, parity="answers: forced, ")
    assert {name for name in plain if twice[name] > plain[name]} == {"parity-small"}
    assert plain["parity-small"] < once["parity-small"]  # no answers
    assert twice["parity-small"] == pytest.approx(2 * plain["parity-small"], abs=TOOLS)


def test_the_machine_is_measured_in_a_moment() -> None:
    begun = time.process_time()
    speed = measure_speed()
    assert min(speed.flops, speed.copied, speed.hashed) > 1e6
    assert time.process_time() - begun < 10  # 0.2 s on an idle core of 2026
