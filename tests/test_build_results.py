"""What a build says of its targets: one that fails stops no other, and table, JSON and JUnit XML come in every case."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from arriero.errors import HOW_TO_GO_ON, STOPPED, MachineLacks
from arriero.export.pipeline.target_build import TargetBuild
from arriero.runtimes.user_cache import VARIABLE
from tests.command import Result, arriero, write_build
from tests.conftest import workshop_profiles


@pytest.fixture
def copy(workshop: Path, tmp_path: Path) -> Path:
    """The workshop with finished stages and no bundles, whose fp32 target cannot meet its threshold."""
    shutil.copytree(workshop / "bundles", tmp_path / "bundles")
    for name in ("fp32", "int8"):
        shutil.rmtree(tmp_path / "bundles" / name)
    profile = (Path(workshop_profiles(workshop)[1])).read_text()
    assert "logits_max_abs_error" not in profile
    exact = Path(__file__).parents[1] / "profiles" / "fp32.yaml"
    strict = exact.read_text().replace("logits_max_abs_error: 1.0e-4", "logits_max_abs_error: 0.0")
    assert strict != exact.read_text()
    (tmp_path / "fp32.yaml").write_text(strict)
    profiles = (str(tmp_path / "fp32.yaml"), workshop_profiles(workshop)[1])
    write_build(tmp_path / "build.yaml", workshop / "scout", profiles=profiles, samples=8, answers="generated")
    return tmp_path


def build(folder: Path, *more: str) -> tuple[Result, dict, ET.Element]:  # type: ignore[type-arg]
    """Build with both files; the result, the JSON, the root of the XML."""
    out, junit = folder / "reports" / "build.json", folder / "reports" / "build.xml"
    done = arriero("build", folder / "build.yaml", "--json", out, "--junit", junit, *more)
    return done, json.loads(out.read_text()), ET.parse(junit).getroot()


def test_a_failed_target_stops_no_other_and_the_table_says_why(copy: Path) -> None:
    done, told, xml = build(copy)
    assert (done.code, told["exit_code"]) == (1, 1)
    assert (copy / "bundles" / "int8" / "manifest.json").is_file()
    assert not (copy / "bundles" / "fp32").exists()
    failed, published = told["targets"]
    assert (failed["state"], failed["exit_code"], published["state"]) == ("failed", 1, "published")
    (failure,) = failed["failures"]
    assert failure["metric"] == "logits_max_abs_error"
    assert failure["limit"] == "at most 0"
    assert "is furthest off" in failure["cause"]
    assert "finer profile" in failure["remedy"]
    assert failed["stages"]["parity-fp32"] > 0
    assert told["bundles"] == [str(copy / "bundles" / "int8")]
    shown = " ".join(done.out.split())
    assert "Logits, largest error" in shown
    assert f"published {copy / 'bundles' / 'int8'}" in shown
    for words in (
        "limit at most 0",
        "layer",
        "choose a finer profile",
        str(copy / "bundles" / "fp32.failed-parity.html"),
    ):
        assert words in done.err
    suites = {suite.get("name"): suite for suite in xml}
    assert {name: suite.get("failures") for name, suite in suites.items()} == {"fp32": "1", "int8": "0"}
    assert all(float(str(suite.get("time"))) > 0 for suite in suites.values())
    names = [case.get("name") for case in suites["int8"].iter("testcase")]
    assert set(names) < {row["metric"] for row in rows(copy / "bundles" / "int8")}  # judged rows only
    assert len(names) == sum(row["status"] != "info" for row in rows(copy / "bundles" / "int8"))


def rows(bundle: Path) -> list[dict]:  # type: ignore[type-arg]
    listed: list[dict] = json.loads((bundle / "parity.json").read_text())["rows"]  # type: ignore[type-arg]
    return listed


def test_a_failed_proof_is_not_measured_again_when_nothing_changed(copy: Path) -> None:
    first, told, _ = build(copy)
    again, repeated, xml = build(copy)
    assert "fp32: prove parity" in first.err
    assert "prove parity" not in again.err
    assert (first.code, again.code) == (1, 1)
    assert repeated["targets"][0]["failures"] == told["targets"][0]["failures"]
    assert [state["state"] for state in repeated["targets"]] == ["failed", "up to date"]
    assert xml[0].get("failures") == "1"
    assert "choose a finer profile" in str(xml[0].findtext("testcase/failure"))


def test_a_fault_in_one_target_has_a_code_of_its_own_and_stops_no_other(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lower = TargetBuild.lower

    def faulty(self: TargetBuild, folder: Path) -> set[str]:
        if self.target.name == "fp32":
            raise ZeroDivisionError("a fault")
        return lower(self, folder)

    monkeypatch.setattr(TargetBuild, "lower", faulty)
    shutil.rmtree(next((copy / "bundles" / ".work").glob("lower-fp32-*")))
    done, told, xml = build(copy)
    assert (done.code, told["exit_code"]) == (70, 70)
    assert "ZeroDivisionError: a fault" in done.err
    assert [one["state"] for one in told["targets"]] == ["not built", "published"]
    assert (xml[0].get("errors"), xml[1].get("errors")) == ("1", "0")


def test_a_shared_stage_that_fails_is_tried_once_and_told_once(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def full(*_: object) -> None:
        tried.append(1)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("arriero.graphs.trace.trace_text", full)
    monkeypatch.setenv(VARIABLE, "")  # so that graphs are traced
    shutil.rmtree(copy / "bundles" / ".work")
    done, told, _ = build(copy)
    assert (done.code, len(tried)) == (MachineLacks.exit_code, 1)
    assert done.err.count("the disk ran full in stage graph") == 1
    assert [one["exit_code"] for one in told["targets"]] == [3, 3]


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [("profile:", "profil:", 0), ("context: ", "context: 9", 2)],
)
def test_files_are_written_when_nothing_was_begun(copy: Path, old: str, new: str, names: int) -> None:
    """A build file that cannot be read has no targets; one that does not fit has them all, none built."""
    text = (copy / "build.yaml").read_text()
    (copy / "build.yaml").write_text(text.replace(old, new))
    done, told, xml = build(copy)
    assert (done.code, told["exit_code"]) == (2, 2)
    assert len(told["targets"]) == names
    assert told["error"]
    assert xml.get("errors") == str(max(names, 1))


def test_json_prints_or_writes_and_never_over_a_build_file(copy: Path) -> None:
    text = (copy / "build.yaml").read_text()
    refused = arriero("build", copy / "build.yaml", f"--json={copy / 'build.yaml'}")
    assert (refused.code, "a build file is no place for results" in refused.err) == (2, True)
    printed = arriero("build", "--json", copy / "build.yaml")
    assert printed.json["exit_code"] == 1
    assert (copy / "build.yaml").read_text() == text


@pytest.mark.parametrize("signal", ["SIGINT", "SIGTERM"])
def test_stopped_on_the_way_files_and_table_say_so(copy: Path, signal: str) -> None:
    """In the second target, when the first has failed its proof."""
    code = f"""
import signal, sys, time
from arriero.export.pipeline.target_build import TargetBuild
from arriero.export.__main__ import main
run = TargetBuild._run
def stopped(self):
    if self.target.name == "fp32":
        return run(self)
    time.sleep(0.1)
    self.build.work.ran[f"lower-{{self.target.name}}"] = 0.1
    signal.raise_signal(signal.{signal})
TargetBuild._run = stopped
signal.signal(signal.SIGINT, signal.default_int_handler)
files = ["--junit", {str(copy / "a.xml")!r}, "--json", {str(copy / "a.json")!r}]
sys.argv = ["arriero", "build", {str(copy / "build.yaml")!r}, *files]
main()
"""
    stopped = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert stopped.returncode == STOPPED, stopped.stderr
    assert stopped.stderr.endswith(f"{HOW_TO_GO_ON}\n")
    assert "Traceback" not in stopped.stderr
    assert "furthest off" in stopped.stderr
    assert {"fp32", "int8", "stopped"} <= set(stopped.stdout.split())
    root, told = ET.parse(copy / "a.xml").getroot(), json.loads((copy / "a.json").read_text())
    assert (root.get("failures"), root.get("errors")) == ("1", "1")
    assert all(float(str(suite.get("time"))) > 0.09 for suite in root)
    error = root.find("testsuite[@name='int8']/testcase/error")
    assert error is not None
    assert error.get("message") == HOW_TO_GO_ON
    assert (told["exit_code"], [one["exit_code"] for one in told["targets"]]) == (STOPPED, [1, STOPPED])
    assert told["error"] == HOW_TO_GO_ON


def test_a_reference_that_is_hardly_ever_right_is_told_where_the_build_ends(copy: Path) -> None:
    """The small model answers none of the cases as the set says; the second time the proof is the recorded one."""
    for _ in range(2):
        done, told, _ = build(copy)
        (warning,) = told["targets"][1]["warnings"]
        assert "answers 0 of 8 cases right" in warning
        assert " ".join(done.out.split()).count(f"warning: {warning}") == 2  # of each target
    (copy / "strict.yaml").write_text((copy / "build.yaml").read_text().replace("{}", "{task_accuracy_reference: 0.5}"))
    failed = arriero("build", copy / "strict.yaml")
    assert failed.code == 1
    assert "the checkpoint itself answers these cases wrong" in failed.err


def test_an_earlier_bundle_under_the_name_of_one_that_failed_is_pointed_out(copy: Path) -> None:
    strict = (copy / "fp32.yaml").read_text()
    (copy / "fp32.yaml").write_text(strict.replace("logits_max_abs_error: 0.0", "logits_max_abs_error: 0.01"))
    first, told, _ = build(copy)
    assert (first.code, told["targets"][0]["earlier_bundle"]) == (0, False)
    (copy / "fp32.yaml").write_text(strict)
    done, told, _ = build(copy)
    bundle = copy / "bundles" / "fp32"
    assert (done.code, [one["earlier_bundle"] for one in told["targets"]]) == (1, [True, False])
    assert f"unchanged {bundle}, of an earlier build" in done.out
    assert str(bundle) not in told["bundles"]


def test_parity_of_a_damaged_bundle_writes_its_xml(copy: Path) -> None:
    assert build(copy)[0].code == 1
    bundle = copy / "bundles" / "int8"
    (bundle / "manifest.json").write_text("{}")
    refused = arriero("parity", bundle, "--junit", copy / "parity.xml")
    (suite,) = ET.parse(copy / "parity.xml").getroot()
    assert (refused.code, suite.get("errors")) == (2, "1")


def test_paths_that_look_like_markup_do_no_harm(workshop: Path, tmp_path: Path) -> None:
    """`[/x]` closes a style that nobody opened; a build into such a folder is done and says so."""
    folder = tmp_path / "a[/x] [red]b"
    folder.mkdir(parents=True)
    write_build(folder / "build.yaml", workshop / "scout", "text", samples=3)
    for word in ("plan", "calibrate", "build", "build"):
        done = arriero(word, folder / "build.yaml")
        assert done.code == 0, done.err
    bundle = folder / "bundles" / "fp32"
    assert f"published {bundle}" in done.out
    compared = ("compare", bundle, "--against", workshop / "scout", "--samples", "2", "--forced-routing")
    for words in (("inspect", bundle), ("parity", bundle), ("run", bundle, "Hello", "--max-tokens", "1"), compared):
        done = arriero(*words)
        assert done.code == 0, done.err


def test_files_and_folders_that_cannot_be_written_are_told_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_build(tmp_path / "build.yaml", tmp_path / "none")
    (tmp_path / "file").touch()
    monkeypatch.setattr("arriero.export.build_file.read.load_build", lambda *_: pytest.fail("the build has begun"))
    for option in ("--junit", "--json"):
        for path in (tmp_path, tmp_path / "file" / "x"):
            done = arriero("build", tmp_path / "build.yaml", option, path)
            assert done.code == 2
            assert f"{path}: the report cannot be written (" in done.err
    done = arriero("build", tmp_path / "build.yaml", "--dump-graphs", tmp_path / "file")
    assert done.code == 2
    assert f"--dump-graphs {tmp_path / 'file'}: the folder cannot be written to (File exists)" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build.yaml", "file"]
