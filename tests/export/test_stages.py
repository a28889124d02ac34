"""Stages: done once, resumed after SIGKILL, published without a moment in which both bundles are gone for good."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from arriero.errors import ArrieroError, MachineLacks
from arriero.export.stages import SOURCES, Stage, WorkDir, key_of, read_record, source_hash


def writer(text: str = "x"):
    return lambda folder: (folder / "out.txt").write_text(text) and None


def python(code: str, *args: object) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_stage_runs_once(tmp_path):
    work, runs = WorkDir(tmp_path), []
    stage = Stage("quantise", {"bits": 8}, lambda folder: runs.append(folder) or writer()(folder))
    with work.locked():
        first, second = work.run_stage(stage), work.run_stage(stage)
    assert first == second == tmp_path / ".work" / f"quantise-{stage.key}"
    assert len(runs) == 1
    assert runs[0].name.endswith(".partial")
    record = read_record(first)
    assert record["inputs"] == {"bits": 8}
    assert {name: file["bytes"] for name, file in record["files"].items()} == {"out.txt": 1}
    assert record["peak_memory_bytes"] > 0
    assert record["seconds"] >= 0


def test_keys_follow_name_and_inputs_and_not_their_order():
    assert key_of("a", {"x": 1, "y": [2]}) == key_of("a", {"y": [2], "x": 1})
    keys = {key_of("a", {"x": 1}), key_of("a", {"x": 2}), key_of("b", {"x": 1}), key_of("a", {"x": "1"})}
    assert len(keys) == 4
    with pytest.raises(TypeError):
        key_of("a", {"path": Path("x")})


@pytest.mark.parametrize("damage", ["delete", "shorten", "record", "change"])
def test_a_damaged_result_is_built_again(tmp_path, damage):
    work, stage = WorkDir(tmp_path), Stage("a", {}, writer("hello"), shared=True)
    with work.locked():
        folder = work.run_stage(stage)
        if damage == "delete":
            (folder / "out.txt").unlink()
        elif damage == "shorten":
            (folder / "out.txt").write_text("he")
        elif damage == "record":
            (folder / "stage.json").write_text("{")
        else:
            (folder / "out.txt").write_text("hallo")
        assert work.is_done("a", stage.key) == (damage == "change")
        assert not work.is_intact("a", stage.key)
        assert (work.run_stage(stage) / "out.txt").read_text() == "hello"


def test_a_failing_stage_leaves_no_result_and_its_error_comes_through(tmp_path):
    def fail(folder):
        (folder / "half").touch()
        raise ArrieroError("no")

    work, stage = WorkDir(tmp_path), Stage("a", {}, fail)
    with work.locked(), pytest.raises(ArrieroError, match="no"):
        work.run_stage(stage)
    assert not work.is_done("a", stage.key)


@pytest.mark.parametrize("resumes", [True, False])
def test_what_a_broken_run_left(tmp_path, resumes):
    seen = []

    def run(folder):
        seen.append(sorted(p.name for p in folder.iterdir()))
        (folder / "one").write_text("1")
        if len(seen) == 1:
            raise KeyboardInterrupt
        (folder / "two").write_text("2")

    work, stage = WorkDir(tmp_path), Stage("a", {}, run, resumes)
    with work.locked(), pytest.raises(KeyboardInterrupt):
        work.run_stage(stage)
    with work.locked():
        folder = work.run_stage(stage)
    assert seen == [[], ["one"] if resumes else []]
    assert sorted(p.name for p in folder.iterdir()) == ["one", "stage.json", "two"]


@pytest.mark.parametrize(
    ("error", "word"), [(OSError(errno.ENOSPC, "full"), "disk ran full"), (MemoryError(), "memory")]
)
def test_a_full_machine_is_said_so(tmp_path, error, word):
    def run(folder):
        raise error

    work = WorkDir(tmp_path)
    with work.locked(), pytest.raises(MachineLacks, match=rf"{word}.*in stage quantise.*goes on where it stopped"):
        work.run_stage(Stage("quantise", {}, run))


def test_other_os_errors_stay_themselves(tmp_path):
    def run(folder):
        (folder / "absent").read_text()

    work = WorkDir(tmp_path)
    with work.locked(), pytest.raises(FileNotFoundError):
        work.run_stage(Stage("a", {}, run))


def test_sigkill_in_the_middle_of_a_stage(tmp_path):
    child = python(
        """
        import sys, time
        from pathlib import Path
        from arriero.export.stages import SOURCES, Stage, WorkDir
        def run(folder):
            (folder / "one").write_text("1")
            print("ready", flush=True)
            time.sleep(60)
        work = WorkDir(Path(sys.argv[1]))
        with work.locked():
            work.run_stage(Stage("a", {}, run, resumes=True))
        """,
        tmp_path,
    )
    assert child.stdout.readline() == "ready\n"
    work = WorkDir(tmp_path)
    with (
        pytest.raises(ArrieroError, match=rf"{tmp_path}: process {child.pid} is building.*Wait until it ends"),
        work.locked(),
    ):
        pass
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    stage = Stage("a", {}, lambda folder: (folder / "two").write_text("2") and None, resumes=True)
    assert not work.is_done("a", stage.key)
    with work.locked():
        assert sorted(p.name for p in work.run_stage(stage).iterdir()) == ["one", "stage.json", "two"]


def make_bundle(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(text)
    return folder


def test_publish_replaces_and_leaves_nothing_behind(tmp_path):
    work = WorkDir(tmp_path)
    for text in ("first", "second"):
        with work.locked():
            work.publish(make_bundle(tmp_path / "int8.partial", text), tmp_path / "int8")
        assert (tmp_path / "int8" / "manifest.json").read_text() == text
    assert sorted(p.name for p in tmp_path.iterdir()) == [".work", "int8"]


@pytest.mark.parametrize("renames", [1, 2])
def test_publish_killed_between_its_steps(tmp_path, renames):
    """Killed before the second rename (no bundle in place), or before the old one is deleted."""
    make_bundle(tmp_path / "int8", "old")
    make_bundle(tmp_path / "int8.partial", "new")
    child = python(
        """
        import os, shutil, signal, sys
        from pathlib import Path
        from arriero.export.stages import WorkDir
        left = int(sys.argv[2])
        rename = Path.rename
        def counted(self, target):
            global left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return rename(self, target)
        work = WorkDir(Path(sys.argv[1]))
        with work.locked():
            Path.rename = counted
            work.publish(work.output / "int8.partial", work.output / "int8")
        """,
        tmp_path,
        renames,
    )
    assert child.wait() == -signal.SIGKILL
    with WorkDir(tmp_path).locked():
        assert (tmp_path / "int8" / "manifest.json").read_text() == "new"
        assert sorted(p.name for p in tmp_path.iterdir()) == [".work", "int8"]


def test_deletions_cut_short_are_finished(tmp_path):
    make_bundle(tmp_path / ".deleting-0123abcd", "gone")
    make_bundle(tmp_path / ".work" / ".deleting-0123abcd", "gone")
    with WorkDir(tmp_path).locked():
        assert sorted(p.name for p in tmp_path.iterdir()) == [".work"]
        assert [p.name for p in (tmp_path / ".work").iterdir()] == ["lock"]


def test_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    match = r"file/out: cannot write here \(Not a directory\)\. Choose another"
    with pytest.raises(ArrieroError, match=match), WorkDir(tmp_path / "file" / "out").locked():
        pass


def test_recovery_falls_back_to_the_old_bundle(tmp_path):
    make_bundle(tmp_path / "int8.old-0123abcd", "old")
    make_bundle(tmp_path / "notes.old-version", "mine")
    with WorkDir(tmp_path).locked():
        assert (tmp_path / "int8" / "manifest.json").read_text() == "old"
        assert (tmp_path / "notes.old-version").exists()


def test_prune_keeps_the_plan_s_stages_and_foreign_files(tmp_path):
    work = WorkDir(tmp_path)
    stages = [Stage("a", {"n": n}, writer()) for n in range(3)]
    with work.locked():
        for stage in stages:
            work.run_stage(stage)
        (work.root / f"a-{key_of('a', {'n': 9})}.partial").mkdir()
        work.hash_memo.write_text("{}")
        work.prune([("a", stages[1].key)])
    assert sorted(p.name for p in work.root.iterdir()) == [f"a-{stages[1].key}", "hashes.json", "lock"]


def test_the_lock_is_free_again_after_a_build(tmp_path):
    work = WorkDir(tmp_path)
    for _ in range(2):
        with work.locked():
            assert (work.root / "lock").read_text() == str(os.getpid())


def test_source_hash_reads_each_source_once_and_knows_its_parts(monkeypatch):
    source_hash.cache_clear()
    read, read_bytes = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda file: read.append(file) or read_bytes(file))
    whole = source_hash()
    assert source_hash() == whole
    assert len(read) == len(set(read))
    assert {file.suffix for file in read} == set(SOURCES)
    assert len({whole, source_hash("graphs"), source_hash("graphs", "profiles")}) == 3
    assert whole == source_hash("runtimes", "export", "graphs", "profiles")


def test_source_hash_follows_the_sources_only(tmp_path, monkeypatch):
    for part in ("export", "graphs", "profiles", "runtimes"):
        (tmp_path / part / "__pycache__").mkdir(parents=True)
        (tmp_path / part / "a.py").write_text("a")
    monkeypatch.setattr("arriero.export.stages.PACKAGE", tmp_path)

    def now() -> str:
        source_hash.cache_clear()
        return source_hash()

    seen = [now()]
    (tmp_path / "graphs" / "__pycache__" / "a.pyc").write_text("compiled")
    (tmp_path / "graphs" / "notes.md").write_text("notes")
    assert now() == seen[0]
    for name, text in (("profiles/int4.yaml", "x"), ("runtimes/a.jinja", "x"), ("export/a.py", "b")):
        (tmp_path / name).write_text(text)
        seen.append(now())
    assert len(set(seen)) == 4
    source_hash.cache_clear()


def test_records_are_json_for_machines(tmp_path):
    work = WorkDir(tmp_path)
    with work.locked():
        folder = work.run_stage(Stage("a", {"nested": {"x": [1, 2]}}, writer()))
    assert json.loads((folder / "stage.json").read_text())["inputs"] == {"nested": {"x": [1, 2]}}
