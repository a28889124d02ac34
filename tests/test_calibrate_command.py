"""`arriero calibrate` and a calibrated build, through the command: seen, killed, gone on with, reused, recorded."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from pathlib import Path

import pytest
from PIL import Image

from arriero.export.pipeline import stages as stage_files
from arriero.profiles.recipe import shipped
from arriero.runtimes.manifest import FILE
from arriero.runtimes.user_cache import VARIABLE
from tests.command import arriero, write_build
from tests.refusals import check
from tests.small import small_maverick, small_scout
from tests.stopping import run_and_kill, stages

SAMPLES = 10


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `scout` (checkpoint), `data` (a set with its picture) and `small4.yaml`. Read-only."""
    folder = tmp_path_factory.mktemp("bench")
    small_scout(folder / "scout")
    # The shipped profile with blocks that divide the small model, and without promises on what random weights know.
    text = shipped()["int4"].read_text().replace("block: 64", "block: 32").replace("name: int4", "name: small4")
    text = text.replace("minimum_tokens: 16", "minimum_tokens: 64")  # which some of a small model's experts miss
    text = text.replace("kl_over_rtn: 0.5", "kl_over_rtn: 0.9").replace("task_accuracy_drop: 0.02", "")
    (folder / "small4.yaml").write_text(text)
    (folder / "data").mkdir()
    Image.new("RGB", (60, 40), (200, 30, 60)).save(folder / "data" / "red.png")
    asked = [{"type": "image", "path": "red.png"}, {"type": "text", "text": "Describe the image."}]
    samples = [{"prompt": f"What is {n} + 25?", "answer": str(n + 25)} for n in range(SAMPLES - 1)]
    lines = [*samples, {"messages": [{"role": "user", "content": asked}], "answer": "a red field"}]
    (folder / "data" / "seen.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


@pytest.fixture
def build_file(bench: Path, tmp_path: Path) -> Path:
    """A build of the small4 profile, calibrated on the set in `tmp_path`/data."""
    shutil.copytree(bench / "data", tmp_path / "data")
    file = write_build(tmp_path / "build.yaml", bench / "scout", profiles=(str(bench / "small4.yaml"),), samples=8)
    return use_set(file, "data/seen.jsonl")


def use_set(file: Path, name: str) -> Path:
    text = file.read_text()
    file.write_text(text.replace("calibration: {samples: 8", f"calibration: {{set: {name}"))
    assert file.read_text() != text
    return file


def test_a_build_tells_of_each_step_once_under_its_own_name_and_of_every_byte_that_it_reads(
    build_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_files, "WORTH_TELLING", 1)
    monkeypatch.setenv(VARIABLE, "")  # so that graphs are traced
    built = arriero("build", build_file)
    assert built.code == 0, built.err
    lines = re.findall(r"^\[\d\d:\d\d\] (.+): (.*)in [\d.]+ s$", built.err, re.M)
    told = dict(lines)
    assert len(told) == len(lines), built.err
    (target,) = (folder.name for folder in (build_file.parent / "bundles").iterdir() if (folder / FILE).is_file())
    assert list(told)[:2] == ["plan", "hash checkpoint"]
    for step in (f"{target}: write text weights", f"{target}-rtn: write text weights", f"{target}-rtn: load"):
        assert step in told
    # the baseline is measured and gone before the bundle's own weights are written: there is never a second copy
    steps = list(told)
    assert steps.index(f"{target}: measure the RTN baseline") < steps.index(f"{target}: write embed weights")
    for step in ("hash checkpoint", "graph: hash files", "calibrate: hash files", f"lower-{target}: hash files"):
        done, total = told[step].split(" of ")
        assert total.endswith(("iB ", " B "))
        assert done
    again = arriero("build", build_file)
    assert "hash checkpoint" not in again.err  # nothing is read


def test_a_calibrated_build_is_killed_goes_on_and_says_what_it_saw(build_file: Path) -> None:
    output = build_file.parent / "bundles"
    run_and_kill(build_file, "calibrate-*.partial/layer-001.json", "calibrate")
    assert not any(name.startswith("calibrate") for name in stages(output))
    (left,) = output.glob(".work/calibrate-*.partial")
    first = (left / "layer-000.json").stat().st_mtime_ns
    seen = arriero("calibrate", build_file, "--json")
    assert seen.code == 0, seen.err
    assert "calibrate: layer 0" not in seen.err  # what was done before the kill is not done again
    (stage,) = output.glob(".work/calibrate-*")
    assert (stage / "layer-000.json").stat().st_mtime_ns == first
    _agrees_with_the_stage(seen.json, stage)

    finished = stages(output)
    built = arriero("build", build_file)
    assert built.code == 0, built.err
    thin = sum(got < 64 for layer in seen.json["layers"] for got in layer["tokens_per_expert"])
    told = f"calibration for profile small4: {thin} of 16 experts had fewer than 64 calibration tokens"
    assert (told in built.err) == (thin > 0)
    assert "calibration for profile small4: " in built.err
    assert finished.items() <= stages(output).items()
    bundle = output / "small4"
    rows = {row["metric"]: row for row in arriero("parity", bundle, "--json").json["rows"]}
    assert rows["kl_over_rtn"]["status"] == "pass"
    assert 0 < rows["logits_kl_mean"]["value"] / rows["rtn_kl_mean"]["value"] <= 0.9
    described = arriero("inspect", bundle, "--json").json
    assert described["calibration"] == seen.json["calibration"]
    assert described["calibration"]["samples"] == {"text": SAMPLES - 1, "image": 1}
    assert described["fallback"] == [{**one, "rule": "nearest"} for one in seen.json["profiles"][0]["experts"]]
    shown = " ".join(arriero("inspect", bundle).out.split())
    assert f"seen.jsonl, seed 11: {SAMPLES - 1} text, 1 image samples; sha256" in shown
    assert arriero("run", bundle, "What is 3 + 25?", "--max-tokens", "2").code == 0

    # Another picture under the same name is another set: it is calibrated anew, and only then built.
    Image.new("RGB", (60, 40), (20, 230, 60)).save(build_file.parent / "data" / "red.png")
    states = {stage["name"]: stage["done"] for stage in arriero("plan", build_file, "--json").json["stages"]}
    undone = dict.fromkeys(("calibrate", "lower-small4", "rtn-small4", "parity-small4"), False)
    assert states == {"graph": True, "reference": True, **undone}
    again = arriero("calibrate", build_file, "--json").json
    assert again["calibration"]["sha256"] != seen.json["calibration"]["sha256"]
    assert again["layers"] != seen.json["layers"]


def _agrees_with_the_stage(told: dict, stage: Path) -> None:  # type: ignore[type-arg]
    coverage = json.loads((stage / "part.json").read_text())["coverage"]
    ranges = json.loads((stage / "ranges.json").read_text())
    layers = told["layers"]
    assert {str(layer["layer"]): layer["tokens_per_expert"] for layer in layers} == coverage
    assert len({sum(counts) for counts in coverage.values()}) == 1  # every layer sees every token
    for layer in layers:
        prefix = f"language_model.model.layers.{layer['layer']}"
        largest = layer["largest_input"]
        assert largest["attention"] == ranges[f"{prefix}.self_attn.v_proj.weight"]["largest"] > 0
        experts = ranges[f"{prefix}.feed_forward.experts.down_proj"]
        assert largest["expert inner"] == max(one["largest"] for one in experts)
        assert largest["expert"] <= largest["FFN"]  # the same stream, times a score below 1
    (profile,) = told["profiles"]
    assert (profile["name"], profile["minimum_tokens"], profile["below"]) == ("small4", 64, "nearest")
    thin = [(layer["layer"], n) for layer in layers for n, got in enumerate(layer["tokens_per_expert"]) if got < 64]
    assert [(one["layer"], one["expert"]) for one in profile["experts"]] == thin
    record = json.loads((stage / "stage.json").read_text())
    assert (told["seconds"], told["peak_memory_bytes"]) == (record["seconds"], record["peak_memory_bytes"])
    # The peak is the process's own, here with all that pytest holds; estimates are held against it in test_estimate.py.
    assert min(told["peak_memory_bytes"], told["planned_memory_bytes"]) > 0


def test_people_see_coverage_ranges_time_and_memory(tmp_path: Path) -> None:
    small_maverick(tmp_path / "maverick")
    file = write_build(tmp_path / "build.yaml", Path("maverick"), "text", samples=3)
    shown, told = arriero("calibrate", file), arriero("calibrate", file, "--json")
    assert (shown.code, told.code) == (0, 0)
    layer = told.json["layers"][1]
    counts = layer["tokens_per_expert"]
    cells = next(line.split() for line in shown.out.splitlines() if line.split()[:1] == ["1"])
    assert cells[1] == "/".join(f"{value:,.6g}" for value in (min(counts), statistics.median(counts), max(counts)))
    assert cells[2] == f"{layer['largest_input']['attention']:.3g}"
    assert "dense" in shown.out
    assert "peak memory" in shown.out
    assert "embedded, seed 11: 3 text samples; sha256" in shown.out
    assert told.json["layers"][0]["tokens_per_expert"] is None
    assert told.json["planned_memory_bytes"] is None  # it was done before
    assert told.json["profiles"] == []  # fp32 does not calibrate; its coverage is counted all the same


# --- what is refused, before anything is done


@pytest.mark.parametrize("verb", ["plan", "build", "calibrate"])
def test_sets_that_cannot_be_used(build_file: Path, verb: str) -> None:
    data = build_file.parent / "data"
    (data / "bad.jsonl").write_text('{"prompt": "a", "anser": "b"}\n{"messages": 3}\n')
    use_other(build_file, "data/seen.jsonl", "data/bad.jsonl")
    check(arriero(verb, build_file), "2 problems", r"bad.jsonl:1: unknown key", "Did you mean")

    words = [line for line in (data / "seen.jsonl").read_text().splitlines() if "prompt" in line]
    (data / "bad.jsonl").write_text("\n".join(words))
    check(arriero(verb, build_file), f"set of {SAMPLES - 1} samples holds no images", "calibration.set", "among what")

    (data / "bad.jsonl").write_bytes((data / "seen.jsonl").read_bytes())
    (data / "red.png").write_bytes(b"no picture")
    check(arriero(verb, build_file), "not a readable image", f"bad.jsonl:{SAMPLES}: .*red.png", "file is complete")

    use_other(build_file, "set: data/bad.jsonl", "set: data/gone.jsonl")
    check(arriero(verb, build_file), "no data set 'data/gone.jsonl'", r"build.yaml:7: calibration.set", "Did you mean")
    assert not (build_file.parent / "bundles").exists()


def use_other(file: Path, old: str, new: str) -> None:
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def test_too_few_samples_and_one_set_for_both(build_file: Path) -> None:
    text = build_file.read_text()
    build_file.write_text(text.replace("seed: 11", f"samples: {SAMPLES + 1}, seed: 11"))
    told = f"{SAMPLES + 1} samples are wanted and the set holds {SAMPLES}"
    check(arriero("calibrate", build_file), told, "seen.jsonl", "leave it out to use them all")
    build_file.write_text(text.replace("cases: {samples: 8", "cases: {set: data/../data/seen.jsonl, samples: 8"))
    told = "this set is also the calibration's, so the report would test on what it was tuned to"
    check(arriero("calibrate", build_file), told, r"build.yaml:8: parity.cases.set", "Split it in two files")


def test_answers_that_are_judged_must_be_there(build_file: Path) -> None:
    (build_file.parent / "data" / "asked.jsonl").write_text('{"prompt": "What is 2 + 2?"}\n')
    use_other(build_file, "cases: {samples: 8", "cases: {set: data/asked.jsonl")
    use_other(
        build_file, "answers: forced, thresholds: {}", "answers: generated, thresholds: {task_accuracy_drop: 0.5}"
    )
    check(arriero("build", build_file), "no parity case has an answer", "thresholds.task_accuracy_drop", "Give answers")


def test_parity_on_prompts_of_ones_own(bench: Path, workshop: Path, tmp_path: Path) -> None:
    asked = ("parity", workshop / "bundles" / "fp32", "--against", workshop / "scout", "--json")
    told = arriero(*asked, "--set", bench / "data" / "seen.jsonl", "--samples", "3", "--seed", "2")
    assert told.code == 0, told.err
    assert told.json["labels"]["held-out prompts"] == "seen.jsonl"
    names = [case["name"] for case in told.json["cases"]]
    assert len(names) == 3
    assert all(name.startswith("seen.jsonl:") for name in names)
    (tmp_path / "asked.jsonl").write_text('{"prompt": "What is 2 + 2?"}\n')
    unanswered = arriero(*asked, "--set", tmp_path / "asked.jsonl")
    assert unanswered.code == 0, "float32 promises no accuracy"
    judged = ("parity", workshop / "bundles" / "int8", *asked[2:], "--set", tmp_path / "asked.jsonl")
    check(arriero(*judged), "no parity case has an answer", "thresholds.task_accuracy_drop", "Give answers")
    check(arriero(*asked, "--set", tmp_path / "gone.jsonl"), "no such data set", "gone.jsonl", "JSONL file")
