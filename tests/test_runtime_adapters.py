"""Bundles that switch between adapters, by the command and the runtime: each proven against the model that has it
merged, answered with as that model's own bundle answers."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

import arriero as library
from arriero.errors import ArrieroError
from arriero.export.proof.reference import TorchBackend
from arriero.graphs.checkpoint import Checkpoint
from arriero.runtimes.session import Session
from tests.adapters import save_adapter
from tests.command import arriero, write_build
from tests.shared import made_once
from tests.small import small_scout

NAMES = ("German", "terse")
PROMPT = "What is 17 + 25?"


def make(folder: Path) -> None:
    """`scout`, two adapters of it, and a build that switches between them."""
    small_scout(folder / "scout")
    for seed, name in enumerate(NAMES):
        save_adapter(folder / "scout", folder / name, seed, rank=2 + 3 * seed)
    file = write_build(folder / "build.yaml", Path("scout"), modalities="text")
    file.write_text(f"runtime_adapters: {{German: German, terse: terse}}\n{file.read_text()}")
    built = arriero("build", file)
    assert built.code == 0, built.err


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "runtime-adapters", make)


@pytest.fixture
def bundle(place: Path) -> Path:
    return place / "bundles" / "fp32"


def test_each_adapter_has_its_record_and_its_proof(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert list(manifest["adapters"]) == list(NAMES)
    hashes = {manifest["chain"]["checkpoint"], *(one["checkpoint"] for one in manifest["adapters"].values())}
    records = {manifest["record"], *(one["record"] for one in manifest["adapters"].values())}
    assert len(hashes) == len(records) == 3
    measured = arriero("parity", bundle, "--json").json
    assert set(measured["adapters"]) == set(NAMES)
    for report in (measured, *measured["adapters"].values()):
        values = {row["metric"]: row["value"] for row in report["rows"]}
        assert values["logits_relative_l2"] < 1e-5
        assert report["passed"]
    assert [report["labels"]["adapter"] for report in measured["adapters"].values()] == list(NAMES)
    recorded = arriero("parity", bundle, "--recorded", "--json").json
    assert set(recorded["adapters"]) == set(NAMES)


def test_a_bundles_suite_has_the_rows_of_every_adapter(place: Path, bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(place, tmp_path / "place", symlinks=True)
    found = []
    for words in (["build", tmp_path / "place" / "build.yaml"], ["parity", bundle, "--recorded"]):
        done = arriero(*words, "--junit", tmp_path / "told.xml")
        assert done.code == 0, done.err
        (suite,) = ET.parse(tmp_path / "told.xml").getroot()
        found.append([case.get("name") for case in suite.iter("testcase")])
    rows = json.loads((bundle / "parity.json").read_text())["rows"]
    judged = [row["metric"] for row in rows if row["status"] != "info"]
    assert found[0] == found[1] == [*judged, *(f"{metric} with {name}" for name in NAMES for metric in judged)]


def test_it_answers_as_the_model_with_the_adapter_merged(place: Path, bundle: Path) -> None:
    answers = {}
    with library.load(bundle) as session:
        for name in (None, *NAMES):
            merged = Checkpoint.open(place / "scout", [] if name is None else [place / name])
            with Session(TorchBackend(merged, text_only=True), session.processor) as reference:
                answers[name] = reference.generate(PROMPT, max_tokens=12).token_ids
            assert session.generate(PROMPT, max_tokens=12, adapter=name).token_ids == answers[name]
            both = session.generate_batch([PROMPT, "Hello"], max_tokens=12, adapter=name)
            assert both[0].token_ids == answers[name]
            state = session.prefill(PROMPT, adapter=name)
            assert int(np.argmax(state.logits)) == answers[name][0]
    assert len({tuple(ids) for ids in answers.values()}) == 3, "the adapters change nothing"
    with library.load(bundle, adapter="terse") as session:
        assert session.generate(PROMPT, max_tokens=12).token_ids == answers["terse"]
        assert session.generate(PROMPT, max_tokens=12, adapter=None).token_ids == answers[None]
    ran = arriero("run", bundle, PROMPT, "--adapter", "German", "--max-tokens", "12", "--json").json
    assert ran["token_ids"] == answers["German"]


def test_a_name_that_is_not_there_is_refused(bundle: Path, workshop: Path) -> None:
    refused = arriero("run", bundle, PROMPT, "--adapter", "german")
    assert refused.code == 2
    assert "there is no adapter 'german'; expected one of German, terse" in refused.err
    with library.load(bundle) as session, pytest.raises(ArrieroError, match="there is no adapter 'x'"):
        session.generate_batch([PROMPT], adapter="x")
    with pytest.raises(ArrieroError, match="none: the bundle has no adapters"):
        library.load(workshop / "bundles" / "fp32", adapter="x")


def test_a_checkpoint_with_the_adapter_merged_judges_the_bundle_with_it(place: Path, bundle: Path) -> None:
    judged = arriero("parity", bundle, "--against", place / "scout", "--adapter", place / "terse", "--json")
    assert judged.code == 0, judged.err
    assert judged.json["labels"]["adapter"] == "terse"
    both = ["--adapter", place / "terse", "--adapter", place / "German"]
    refused = arriero("parity", bundle, "--against", place / "scout", *both)
    assert refused.code == 2
    assert "the bundle was not made from this checkpoint" in refused.err


def test_a_record_of_one_adapter_is_measured_with_that_one(bundle: Path) -> None:
    record = bundle / "adapters" / "terse" / "reference"
    measured = arriero("parity", bundle, "--record", record, "--json").json
    assert measured["labels"]["adapter"] == "terse"
    assert measured["passed"]


def test_a_proof_that_is_taken_away_or_exchanged_is_missed(bundle: Path, tmp_path: Path) -> None:
    own, other = (Path("adapters") / name / "parity.json" for name in NAMES)
    copy = tmp_path / "gone"
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["files"][own.as_posix()]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArrieroError, match="the parity report is not that of this bundle"):
        library.load(copy)
    shutil.copy(bundle / "manifest.json", copy / "manifest.json")
    shutil.copy(copy / other, copy / own)
    with pytest.raises(ArrieroError, match=r"German/parity\.json"):
        library.load(copy)


def test_an_unchanged_build_does_nothing_and_a_changed_adapter_what_hangs_on_it(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place, tmp_path / "again", symlinks=True)
    file = tmp_path / "again" / "build.yaml"
    again = arriero("build", file, "--json").json  # of the copied files the hashes are not known yet
    assert [target["state"] for target in again["targets"]] == ["up to date"]
    assert arriero("plan", file, "--json").json["done"]
    save_adapter(tmp_path / "again" / "scout", tmp_path / "new", seed=9)
    shutil.copy(tmp_path / "new" / "adapter_model.safetensors", tmp_path / "again" / "terse")
    config = tmp_path / "again" / "terse" / "adapter_config.json"
    config.write_text((tmp_path / "new" / "adapter_config.json").read_text())
    arriero("build", file)
    before, after = (
        json.loads((folder / "bundles" / "fp32" / "manifest.json").read_text())
        for folder in (place, tmp_path / "again")
    )
    changed = {name for name, key in after["build"].items() if before["build"][name] != key}
    assert changed == {"lower-fp32", "reference+terse", "parity-fp32", "parity-fp32+German", "parity-fp32+terse"}


def test_what_no_backend_or_file_system_takes_is_refused_by_plan(place: Path, tmp_path: Path) -> None:
    text = (place / "build.yaml").read_text().replace("scout", str(place / "scout"))
    names = {name: place / name for name in NAMES}

    def plan(adapters: dict[str, Path], backend: str = "onnxruntime") -> str:
        table = ", ".join(f"{json.dumps(name)}: {json.dumps(str(folder))}" for name, folder in adapters.items())
        lines = [line for line in text.splitlines() if not line.startswith("runtime_adapters")]
        file = tmp_path / "build.yaml"
        file.write_text("\n".join([f"runtime_adapters: {{{table}}}", *lines]).replace("onnxruntime", backend))
        done = arriero("plan", file)
        assert done.code in (2, 3), done.out
        return done.err

    assert "the backend tensorrt switches between no adapters" in plan(names, "tensorrt")
    assert "cannot be a folder name" in plan({"a/b": place / "terse"})
    assert "two names differ in upper and lower case alone" in plan({"A": place / "terse", "a": place / "German"})
    assert "there is no folder" in plan({"gone": place / "gone"})
    head = save_adapter(place / "scout", tmp_path / "head", modules=("lm_head", "q_proj"))
    assert "changes 1 tensors that cannot be switched while a bundle runs" in plan({"head": head})
