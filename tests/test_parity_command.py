"""`arriero parity`: against the bundle's record, another, the checkpoint itself; and on a bare device."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from arriero.runtimes.manifest import FileRecord, link, manifest_digest, parity_digest
from tests.command import arriero, contents, write_build
from tests.refusals import check
from tests.small import edit_json, small_scout

# What `pip install arriero[onnxruntime]` does not bring. (Pydantic it may, with typer; none of our own files takes it.)
BUILD_ONLY = (
    *("torch", "onnx", "onnx_ir", "onnxscript", "transformers", "pydantic", "yaml", "safetensors"),
    *("ml_dtypes", "av", "tvm", "tvm_ffi", "tensorrt", "cuda"),
)
DEVICE = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BUILD_ONLY!r} and not (name.startswith("pydantic") and not self.is_ours()):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

    def is_ours(self):
        # whether the import stands in a file of ours
        frame = sys._getframe(2)
        while frame.f_globals["__name__"].startswith("importlib"):
            frame = frame.f_back
        return frame.f_globals["__name__"].startswith("arriero")

sys.meta_path.insert(0, Absent())
from arriero.export.__main__ import main
main()
"""


def on_device(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """The command where only the runtime's own packages can be imported."""
    command = [sys.executable, "-c", DEVICE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def rows(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["metric"]: row for row in report["rows"]}


@pytest.fixture
def bundle(workshop: Path, tmp_path: Path) -> Path:
    """A copy of the exact bundle, its record included, to change."""
    shutil.copytree(workshop / "bundles" / "fp32", tmp_path / "fp32")
    return tmp_path / "fp32"


@pytest.fixture(scope="module")
def separate(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `bundles` with `fp32`, whose record was published beside it, and the build file."""
    folder = tmp_path_factory.mktemp("separate")
    file = write_build(folder / "build.yaml", workshop / "scout", samples=8)
    file.write_text(file.read_text().replace("parity: {", "parity: {record: separate, forced_routing: true, "))
    built = arriero("build", file)
    assert built.code == 0, built.err
    return folder


@pytest.mark.parametrize("name", ["fp32", "int8"])
def test_a_bundle_is_measured_again_and_fares_as_in_its_build(workshop, name):
    told = arriero("parity", workshop / "bundles" / name, "--json")
    assert told.code == 0, told.err
    recorded = arriero("parity", workshop / "bundles" / name, "--recorded", "--json").json
    assert undated(told.json) == undated(recorded)  # the same machine, the same figures to the last digit
    manifest = json.loads((workshop / "bundles" / name / "manifest.json").read_text())
    assert told.json["labels"]["reference record"] == manifest["record"]
    assert (told.json["answers"], told.json["labels"]["seed"]) == ("generated", "29")
    assert manifest["chain"]["record"] == link(manifest["chain"]["artifact"], manifest["record"])
    record = (workshop / "bundles" / name / "reference" / "record.json").read_bytes()
    assert hashlib.sha256(record).hexdigest() == manifest["record"]


def undated(report):
    """The report without when it was made."""
    labels = {name: value for name, value in report["labels"].items() if name != "measured"}
    assert len(labels) == len(report["labels"]) - 1
    return {**report, "labels": labels}


def test_all_targets_are_proven_against_one_record(workshop):
    (stage,) = (workshop / "bundles" / ".work").glob("reference-*")
    records = [workshop / "bundles" / name / "reference" / "record.json" for name in ("fp32", "int8")]
    assert len({path.read_bytes() for path in (*records, stage / "record.json")}) == 1
    assert len({path.stat().st_ino for path in (*records, stage / "record.json")}) == 1, "stored once"


def test_the_page_names_the_record(workshop, tmp_path):
    assert arriero("parity", workshop / "bundles" / "fp32", "--html", tmp_path / "page.html").code == 0
    manifest = json.loads((workshop / "bundles" / "fp32" / "manifest.json").read_text())
    assert manifest["record"] in (tmp_path / "page.html").read_text()


def test_against_the_checkpoint_the_record_is_computed_again(workshop):
    told = arriero("parity", workshop / "bundles" / "fp32", "--against", workshop / "scout", "--json")
    assert told.code == 0, told.err
    exact, recorded = rows(told.json), rows(arriero("parity", workshop / "bundles" / "fp32", "--json").json)
    assert set(exact) == set(recorded)
    assert all(not row["error"] for row in exact.values()), "nothing is estimated"
    assert recorded["layer_relative_l2_highest"]["error"] > 0
    assert exact["logits_max_abs_error"]["value"] == pytest.approx(recorded["logits_max_abs_error"]["value"], abs=1e-4)


def forge(bundle: Path, change: Callable[[Path, dict[str, Any]], None]) -> Path:
    """A record that says something else, with hashes that fit what it says."""
    folder = bundle.parent / "forged"
    shutil.copytree(bundle / "reference", folder)
    data = json.loads((folder / "record.json").read_text())
    change(folder, data)
    for name, entry in data["files"].items():
        entry["sha256"] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "record.json").write_text(json.dumps(data))
    return folder


def other_logit(folder: Path, data: dict[str, Any]) -> None:
    logits = np.load(folder / "logits.npy")
    logits[data["cases"][0]["tokens"] + 3, 7] += 0.1  # of the second case
    np.save(folder / "logits.npy", logits)


def other_expert(folder: Path, data: dict[str, Any]) -> None:
    ids, margins = np.load(folder / "layer-002.expert_ids.npy"), np.load(folder / "layer-002.margins.npy")
    first = data["cases"][0]["tokens"]
    clearest = first + int(margins[first : first + data["cases"][1]["tokens"]].argmax())
    ids[clearest] = (ids[clearest] + 1) % 4
    np.save(folder / "layer-002.expert_ids.npy", ids)


def other_sketch(folder: Path, data: dict[str, Any]) -> None:
    sketch = np.load(folder / "layer-001.sketch.npy")
    sketch[1, :-1] *= 1.01
    np.save(folder / "layer-001.sketch.npy", sketch)


def other_answer(folder: Path, data: dict[str, Any]) -> None:
    data["cases"][1]["generated_text"] += "!"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (other_logit, "logits"),
        (other_expert, "experts of layer 2"),
        (other_sketch, "layer 1"),
        (other_answer, "the generated answer"),
    ],
)
def test_a_record_that_says_otherwise_than_the_checkpoint_is_refused(workshop, bundle, change, what):
    record = forge(bundle, change)
    told = arriero("parity", bundle, "--record", record, "--against", workshop / "scout")
    check(told, f"otherwise than the checkpoint: {what}", "case arithmetic-1", "arriero build")


def test_a_record_in_a_bundle_that_was_changed_is_damage(bundle):
    content = bytearray((bundle / "reference" / "logits.npy").read_bytes())
    content[-2] ^= 1
    (bundle / "reference" / "logits.npy").write_bytes(content)
    check(arriero("parity", bundle), "changed or damaged", "reference/logits.npy", "Copy the bundle again")


def test_a_record_of_other_cases_from_elsewhere(workshop, separate):
    """The separate record was written with forced answers; the bundle was proven on generated ones."""
    (record,) = (separate / "bundles").glob("reference-*")
    told = arriero("parity", workshop / "bundles" / "fp32", "--record", record, "--json")
    assert told.code == 0, told.err
    assert told.json["answers"] == "forced"
    assert told.json["labels"]["reference record"].startswith(record.name.removeprefix("reference-"))


def test_a_record_of_another_checkpoint_is_refused(workshop, tmp_path):
    small_scout(tmp_path / "other", seed=99)
    built = arriero("build", write_build(tmp_path / "build.yaml", Path("other"), samples=4))
    assert built.code == 0, built.err
    foreign = tmp_path / "bundles" / "fp32" / "reference"
    told = arriero("parity", workshop / "bundles" / "fp32", "--record", foreign)
    check(told, "not made from this record's checkpoint", str(foreign), "what the bundle was built from")


# --- a record that is kept apart


def test_a_separate_record_is_published_beside_its_bundles(separate):
    bundle = separate / "bundles" / "fp32"
    (record,) = (separate / "bundles").glob("reference-*")
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["record"].startswith(record.name.removeprefix("reference-"))
    assert not (bundle / "reference").exists()
    assert not [name for name in manifest["files"] if name.startswith("reference")]
    prompts = [case["prompt"] for case in json.loads((record / "record.json").read_text())["cases"]]
    words = b"".join((bundle / name).read_bytes() for name in manifest["files"] if not name.endswith(".safetensors"))
    assert not [prompt for prompt in prompts if str(prompt).encode() in words]
    check(arriero("parity", bundle), "does not bring its reference record", "fp32", "Give its folder with --record")
    told = arriero("parity", bundle, "--record", record, "--json")
    assert told.code == 0, told.err
    assert undated(told.json) == undated(arriero("parity", bundle, "--recorded", "--json").json)
    assert "task_accuracy_drop" not in rows(told.json)
    assert rows(told.json)["task_accuracy_forced_drop"]["value"] == 0.0
    assert "kept apart" in arriero("inspect", bundle).out


def test_a_separate_record_that_is_gone_is_published_again(separate):
    (record,) = (separate / "bundles").glob("reference-*")
    before = contents(separate / "bundles" / "fp32")
    shutil.rmtree(record)
    built = arriero("build", separate / "build.yaml")
    assert built.code == 0, built.err
    assert record.is_dir()
    assert contents(separate / "bundles" / "fp32") == before
    assert "up to date" in arriero("build", separate / "build.yaml").err


# --- a device


def test_a_device_measures_runs_and_inspects_with_the_runtime_s_packages_alone(workshop):
    bundle = workshop / "bundles" / "int8"
    measured = on_device("parity", bundle, "--json")
    assert measured.returncode == 0, measured.stderr
    there, here = json.loads(measured.stdout), arriero("parity", bundle, "--json").json
    for report in (there, here):
        del report["labels"]["measured"]  # the minute, which may have changed
    assert there == here
    for arguments in (
        ("parity", bundle, "--recorded"),
        ("parity", bundle),
        ("inspect", bundle),
        ("inspect", bundle, "--json"),
    ):
        done = on_device(*arguments)
        assert (done.returncode, done.stderr.count("Traceback")) == (0, 0), done.stderr
    answered = on_device("run", bundle, "What is 17 + 25?", "--max-tokens", "3")
    assert answered.returncode == 0, answered.stderr
    doctor = on_device("doctor", "--json")
    assert json.loads(doctor.stdout)["can"]["onnxruntime"]["run"]
    assert "onnxruntime: build" in on_device("doctor").stdout


def test_what_a_device_lacks_is_said_in_one_sentence(workshop):
    refused = on_device("parity", workshop / "bundles" / "fp32", "--against", workshop / "scout")
    assert refused.returncode == 3
    assert refused.stderr.strip().endswith("Install what the command needs with `pip install 'arriero[export]'`.")


# --- rounding and routing told apart


def test_a_device_tells_rounding_and_routing_apart_by_record_and_exact_bundle_alone(workshop):
    bundles = workshop / "bundles"
    told = on_device("parity", bundles / "int8", "--forced-routing", "--exact", bundles / "fp32", "--json")
    assert told.returncode == 0, told.stderr
    found = rows(json.loads(told.stdout))
    whole, forced = (found[f"logits_kl_{name}"]["value"] for name in ("mean", "forced_routing"))
    assert 0 < forced <= whole * 1.01  # few tokens of these cases go elsewhere for int8
    assert found["logits_kl_candidate_routing"]["value"] <= whole
    assert found["logits_kl_routing_share"]["value"] == pytest.approx(1 - forced / whole)
    assert "standard error over 8 cases" in found["logits_kl_forced_routing"]["detail"]


def other_experts(folder: Path, data: dict[str, Any]) -> None:
    for path in folder.glob("layer-*.expert_ids.npy"):
        np.save(path, (np.load(path) + 1) % 4)


def test_it_is_the_records_experts_that_a_device_forces_and_the_bundles_that_the_exact_one_takes(workshop, bundle):
    record, exact = forge(bundle, other_experts), workshop / "bundles" / "fp32"
    told = on_device("parity", bundle, "--record", record, "--forced-routing", "--exact", exact, "--json")
    found = rows(json.loads(told.stdout))
    assert found["router_agreement"]["value"] == 0.0
    assert found["logits_kl_mean"]["value"] < 1e-9
    assert found["logits_kl_forced_routing"]["value"] > 1e-3
    assert found["logits_kl_candidate_routing"]["value"] < 1e-9
    assert found["logits_kl_routing_share"]["value"] < -1


def test_pytorch_stands_for_the_exact_bundle_where_it_is_there(workshop):
    bundles = workshop / "bundles"
    by_bundle = arriero("parity", bundles / "int8", "--forced-routing", "--exact", bundles / "fp32", "--json")
    against = arriero("parity", bundles / "int8", "--forced-routing", "--against", workshop / "scout", "--json")
    assert against.code == by_bundle.code == 0, against.err
    for name in ("logits_kl_forced_routing", "logits_kl_candidate_routing"):
        assert rows(against.json)[name]["value"] == pytest.approx(
            rows(by_bundle.json)[name]["value"], rel=1e-3, abs=1e-9
        )


def test_a_build_that_asks_for_it_keeps_what_forced_routing_says(separate):
    told = rows(arriero("parity", separate / "bundles" / "fp32", "--recorded", "--json").json)
    assert told["logits_kl_forced_routing"]["value"] < 1e-9
    assert "Logits, mean KL, routing forced" in (separate / "bundles" / "fp32" / "parity.html").read_text()


@pytest.mark.parametrize(
    ("made", "what"),
    [
        (lambda workshop, _: workshop / "bundles" / "int8", r"has \S+ stored as int8"),
        (lambda _, bundle: before_routing(bundle), "takes no expert ids"),
    ],
)
def test_what_is_given_as_exact_has_to_be(workshop, bundle, made, what):
    given = made(workshop, bundle)
    told = arriero("parity", workshop / "bundles" / "int8", "--exact", given)
    assert re.search(what, told.err)
    check(told, "the bundle given as exact", given.name, "Build one with `profile: fp32`")


def test_a_bundle_from_before_loads_and_says_why_it_is_not_measured(bundle):
    told = arriero("parity", before_routing(bundle), "--forced-routing", "--json")
    assert told.code == 0, told.err
    for name in ("logits_kl_forced_routing", "logits_kl_routing_share"):
        assert rows(told.json)[name]["value"] is None
        assert "the graphs take no expert ids" in rows(told.json)[name]["detail"]


def before_routing(bundle: Path) -> Path:
    """The bundle as builds made it that knew nothing of forced routing: its graph has no such input."""
    model = onnx.load(bundle / "text.onnx", load_external_data=False)
    ours = [value for value in model.graph.input if not value.name.startswith("forced_expert_id.")]
    assert len(ours) < len(model.graph.input)
    del model.graph.input[:]
    model.graph.input.extend(ours)
    (bundle / "text.onnx").unlink()  # a hard link
    (bundle / "text.onnx").write_bytes(model.SerializeToString())
    manifest = json.loads((bundle / "manifest.json").read_text())
    del manifest["proof"]["forced_routing"]
    manifest["files"]["text.onnx"] = FileRecord.of(bundle / "text.onnx").entry()
    chain, files = manifest["chain"], {name: FileRecord(**entry) for name, entry in manifest["files"].items()}
    chain["artifact"] = link(chain["profile"], manifest_digest(manifest))
    chain["record"] = link(chain["artifact"], manifest["record"])
    chain["parity"] = link(chain["record"], parity_digest(files))
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return bundle


# --- options that do not go together


@pytest.mark.parametrize(
    ("options", "what", "remedy"),
    [
        (("--recorded", "--against", "x"), "--recorded measures nothing", "Leave out"),
        (("--recorded", "--record", "x"), "--recorded measures nothing", "Leave out"),
        (("--recorded", "--forced-routing"), "--recorded measures nothing", "Leave out"),
        (("--against", "x", "--exact", "y"), "--against brings an exact model", "Leave out --exact"),
        (("--against", "x", "--record", "y", "--seed", "3"), "brings its own prompts", "Leave out --set"),
    ],
)
def test_options_that_contradict_each_other(workshop, options, what, remedy):
    check(arriero("parity", workshop / "bundles" / "fp32", *options), what, "--", remedy)


def test_no_record_there(workshop, tmp_path):
    told = arriero("parity", workshop / "bundles" / "fp32", "--record", tmp_path)
    check(told, "there is no reference record", str(tmp_path), "Give the folder that a build published")
    shutil.copytree(workshop / "bundles" / "fp32" / "reference", tmp_path / "copy")
    edit_json(tmp_path / "copy" / "record.json", format=9)
    told = arriero("parity", workshop / "bundles" / "fp32", "--record", tmp_path / "copy")
    check(told, "format 9", "record.json", "Copy the record again")
