"""Stages that other builds can use: kept in the user's cache, believed while they are whole, and never needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from arriero.errors import ArrieroError
from arriero.export.build_file.read import load_build
from arriero.export.compile import build_kernels
from arriero.export.pipeline import kept_stages, stage_keys
from arriero.export.pipeline.stage_keys import is_shared, stage_inputs
from arriero.export.pipeline.stages import Stage, WorkDir, key_of, read_record
from arriero.graphs.checkpoint import Checkpoint
from arriero.profiles.recipe import load_profile
from arriero.runtimes.user_cache import VARIABLE, user_cache
from tests.command import arriero, contents, write_build
from tests.small import edit_json, small_scout

Run = Callable[[str], tuple[Path, list[str]]]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache that holds nothing."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a stage in an output folder of the name; gives its folder, and what was told and written on the way."""

    def run(output: str, shared: bool = True, inputs: int = 1) -> tuple[Path, list[str]]:
        told: list[str] = []

        def fill(folder: Path) -> None:
            told.append("ran")
            (folder / "deep").mkdir()
            (folder / "deep" / "graph.onnx").write_text(f"graph {inputs}")

        work = WorkDir(tmp_path / output, watch=lambda step, *_: told.append(step))
        with work.locked():
            return work.run_stage(Stage("graph", {"x": inputs}, fill, shared=shared)), told

    return run


def test_another_output_folder_takes_what_one_made(cache: Path, run: Run) -> None:
    first, told = run("one")
    assert told == ["ran"]
    second, told = run("two")
    assert told == ["graph: as an earlier build made it"]
    assert contents(second) == contents(first) | {".arriero": contents(second)[".arriero"]}
    assert read_record(second) == read_record(first)  # what making it took, and not what copying did
    (second / "deep" / "graph.onnx").write_text("changed")  # a copy: neither the kept one nor the first
    assert run("three")[1] == ["graph: as an earlier build made it"]
    assert (first / "deep" / "graph.onnx").read_text() == "graph 1"


def test_only_what_is_shared_is_kept_and_under_its_own_key(cache: Path, run: Run) -> None:
    run("one", shared=False)
    assert not cache.exists()
    run("one", inputs=2)
    assert run("two", inputs=3)[1] == ["ran"]
    assert len(list((cache / "stages").iterdir())) == 2


@pytest.mark.parametrize("damage", ["change", "delete", "record", "of another", "mark"])
def test_what_is_not_as_it_was_kept_is_made_again_and_kept_anew(cache: Path, run: Run, damage: str) -> None:
    run("one")
    (kept,) = (cache / "stages").iterdir()
    sound = contents(kept)
    file, record = kept / "deep" / "graph.onnx", kept / "stage.json"
    if damage == "change":
        file.write_text("graph 2")
    elif damage == "delete":
        file.unlink()
    elif damage == "record":
        record.write_text("{")
    elif damage == "of another":
        file.write_text("graph 2")
        record.write_text(record.read_text().replace(read_record(kept)["files"]["deep/graph.onnx"]["sha256"], "0" * 64))
    else:
        (kept / ".arriero").unlink()
    folder, told = run("two")
    assert told == ["ran"]
    assert (folder / "deep" / "graph.onnx").read_text() == "graph 1"
    if damage == "mark":  # not ours, so neither believed nor replaced
        assert contents(kept) == {name: value for name, value in sound.items() if name != ".arriero"}
    else:
        assert run("three")[1] == ["graph: as an earlier build made it"]


def test_an_empty_variable_keeps_nothing(
    cache: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv(VARIABLE, "")
    assert user_cache() is None
    assert [run(name)[1] for name in ("one", "two")] == [["ran"], ["ran"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    monkeypatch.delenv(VARIABLE)
    assert user_cache() == tmp_path / "xdg" / "arriero"


def test_a_cache_in_the_home_of_nobody_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "~nobody-has-this-name/cache")
    with pytest.raises(ArrieroError, match=r"ARRIERO_CACHE: ~nobody-has-this-name/cache begins with a home folder"):
        user_cache()


def test_a_cache_that_cannot_be_written_is_none(cache: Path, run: Run) -> None:
    cache.write_text("a file in its place")
    assert [run(name)[1] for name in ("one", "two")] == [["ran"], ["ran"]]
    assert cache.read_text() == "a file in its place"


def test_what_was_used_longest_ago_makes_room(cache: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2):
        run(f"out-{number}", inputs=number)
    run("again", inputs=1)
    size = sum(file.stat().st_size for file in next((cache / "stages").iterdir()).rglob("*") if file.is_file())
    monkeypatch.setattr(kept_stages, "ROOM", size * 5 // 2)
    run("out-3", inputs=3)
    names = {key_of("graph", {"x": number}): number for number in (1, 2, 3)}
    left = {names[path.name.removeprefix("graph-")] for path in (cache / "stages").iterdir()}
    assert left == {1, 3}


def test_a_fine_tune_takes_the_graphs_of_its_base_and_is_lowered_itself(cache: Path, tmp_path: Path) -> None:
    told = []
    for seed in (5, 6):
        small_scout(tmp_path / str(seed) / "scout", seed, vision=False)
        file = write_build(tmp_path / str(seed) / "build.yaml", Path("scout"), "text")
        built = arriero("build", file)
        assert built.code == 0, built.err
        told.append(built.err)
    assert "graph: as an earlier build made it" not in told[0]
    assert "graph: as an earlier build made it" in told[1]
    assert "trace" not in told[1]
    manifests = [json.loads((tmp_path / seed / "bundles" / "fp32" / "manifest.json").read_text()) for seed in "56"]
    changed = {name for name, key in manifests[0]["build"].items() if manifests[1]["build"][name] != key}
    assert changed == {"lower-fp32", "reference", "parity-fp32"}


def test_a_plan_counts_no_time_for_what_is_kept(cache: Path, tmp_path: Path) -> None:
    small_scout(tmp_path / "scout", vision=False)
    file = write_build(tmp_path / "build.yaml", Path("scout"), "text")

    def planned() -> float:
        (graph,) = (one for one in arriero("plan", file, "--json").json["stages"] if one["name"] == "graph")
        return graph["seconds"]

    assert planned() > 1
    work = WorkDir(tmp_path / "elsewhere")
    with work.locked():
        work.run_stage(Stage("graph", _inputs(file)["graph"], lambda folder: None, shared=True))
    assert planned() == 0


def _inputs(file: Path, content: str = "content") -> dict[str, dict[str, object]]:
    build = load_build(file)
    profiles = {target.profile: load_profile(target.profile) for target in build.targets}
    return stage_inputs(build, Checkpoint.open(build.model), content, profiles)


def test_shared_keys_hold_a_models_shape_and_no_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_scout(tmp_path / "scout", vision=False)
    file = write_build(tmp_path / "build.yaml", Path("scout"), "text", backend="tvm")

    def keys(content: str = "content") -> dict[str, str]:
        return {name: key_of(name, inputs) for name, inputs in _inputs(file, content).items()}

    before, other = keys(), keys("other weights")
    shared = {name for name in before if is_shared(name)}
    assert {name.partition("-")[0] for name in shared} == {"graph", "kernels"}
    assert {name for name in before if before[name] == other[name]} == shared
    edit_json(tmp_path / "scout" / "config.json", rms_norm_eps=1e-4)
    reshaped = keys()
    assert reshaped["graph"] != before["graph"]
    monkeypatch.setattr(stage_keys, "describe_compiler", lambda arch: "another")
    recompiled = keys()
    changed = {name.partition("-")[0] for name in before if recompiled[name] != reshaped[name]}
    assert changed == {"kernels", "lower", "parity"}


def test_a_compiler_says_who_it_is_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho 'g++ (Own) 99.1'\necho more\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(build_kernels, "find_compiler", lambda arch: str(compiler))
    assert build_kernels.describe_compiler("x86_64") == "g++ (Own) 99.1"
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert build_kernels.describe_compiler("x86_64") is None
