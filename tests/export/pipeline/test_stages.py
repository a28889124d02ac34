"""Stages: done once, resumed after SIGKILL, used again only as they were written."""

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
from arriero.export.build_file.read import load_build
from arriero.export.pipeline.build import Build
from arriero.export.pipeline.bundle import assemble
from arriero.export.pipeline.ownership import MARK, own
from arriero.export.pipeline.stages import Stage, WorkDir, key_of, read_record
from tests.command import write_build
from tests.small import small_scout


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
    told: list[str] = []
    work, stage = WorkDir(tmp_path, tell=told.append), Stage("a", {}, writer("hello"))
    with work.locked():
        folder = work.run_stage(stage)
        assert not told
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
        assert not told
        assert (work.run_stage(stage) / "out.txt").read_text() == "hello"
        changed = folder / ("stage.json" if damage == "record" else "out.txt")
        assert told == [f"{changed}: stage a left it otherwise; the stage is made again"]
        work.run_stage(stage)
        assert len(told) == 1


@pytest.mark.parametrize("size", [1, 1 << 20])
def test_flipped_bytes_of_a_finished_stage_are_noticed_whatever_its_times_say(tmp_path, size):
    """Any stage, not only those whose files are linked into bundles."""
    work, stage = WorkDir(tmp_path), Stage("calibrate", {}, writer("a" * size), resumes=True)
    with work.locked():
        file = work.run_stage(stage) / "out.txt"
        before = file.stat()
        with file.open("r+b") as opened:
            opened.seek(size // 2)
            opened.write(b"b")
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert not work.is_intact("calibrate", stage.key)
        assert (work.run_stage(stage) / "out.txt").read_text() == "a" * size


def test_a_finished_stage_holds_what_it_says_it_wrote_and_nothing_else(tmp_path):
    """Whatever a killed run left there: journals, halves, files of no known name."""
    work, runs = WorkDir(tmp_path), []

    def run(folder):
        runs.append(folder)
        if len(runs) == 1:
            for name in ("weights/text.safetensors.journal", "weights/stray.bin", "odd/other.txt", "hidden-3.npy"):
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text("left")
            (folder / "odd" / "link").symlink_to(tmp_path / "elsewhere")
            raise KeyboardInterrupt
        (folder / "weights" / "text.safetensors").write_text("weights")
        return ["weights/text.safetensors"]

    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_text("mine")
    stage = Stage("lower", {}, run, resumes=True)
    with work.locked(), pytest.raises(KeyboardInterrupt):
        work.run_stage(stage)
    with work.locked():
        folder = work.run_stage(stage)
    assert list(read_record(folder)["files"]) == ["weights/text.safetensors"]
    left = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir()}
    assert left == {".arriero", "stage.json", "weights/text.safetensors"}
    assert (tmp_path / "elsewhere" / "mine").read_text() == "mine"
    assemble(folder, tmp_path / "bundle")
    assert [file.name for file in (tmp_path / "bundle" / "weights").iterdir()] == ["text.safetensors"]


def test_a_work_folder_that_no_build_made_is_left_alone(tmp_path):
    (tmp_path / ".work").mkdir()
    (tmp_path / ".work" / "lock").write_text("mine")
    with pytest.raises(ArrieroError, match=r"\.work: is in the way of the build, and no build made it"):
        WorkDir(tmp_path).locked().__enter__()
    assert [(file.name, file.read_text()) for file in (tmp_path / ".work").iterdir()] == [("lock", "mine")]


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
    assert seen == [[".arriero"], [".arriero", "one"] if resumes else [".arriero"]]
    assert sorted(p.name for p in folder.iterdir()) == [".arriero", "one", "stage.json", "two"]


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
        from arriero.export.pipeline.stages import Stage, WorkDir
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
        assert sorted(p.name for p in work.run_stage(stage).iterdir()) == [".arriero", "one", "stage.json", "two"]


def test_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    match = r"file/out: cannot write here \(Not a directory\)\. Choose another"
    with pytest.raises(ArrieroError, match=match), WorkDir(tmp_path / "file" / "out").locked():
        pass


def test_prune_keeps_the_plan_s_stages_and_foreign_files(tmp_path):
    work = WorkDir(tmp_path)
    stages = [Stage("a", {"n": n}, writer()) for n in range(3)]
    with work.locked():
        for stage in stages:
            work.run_stage(stage)
        left = work.root / f"a-{key_of('a', {'n': 9})}.partial"
        own(left)
        (left / "half").touch()
        work.hash_memo.write_text("{}")
        mine = work.root / "thesis-20261125abcd"  # named as a stage is
        mine.mkdir()
        (mine / "chapter.txt").write_text("years of work")
        work.prune([("a", stages[1].key)])
    kept = [".arriero", f"a-{stages[1].key}", "hashes.jsonl", "lock", mine.name]
    assert sorted(p.name for p in work.root.iterdir()) == kept
    assert (mine / "chapter.txt").read_text() == "years of work"


def test_the_lock_is_free_again_after_a_build(tmp_path):
    work = WorkDir(tmp_path)
    for _ in range(2):
        with work.locked():
            assert (work.root / "lock").read_text() == str(os.getpid())


def test_records_are_json_for_machines(tmp_path):
    work = WorkDir(tmp_path)
    with work.locked():
        folder = work.run_stage(Stage("a", {"nested": {"x": [1, 2]}}, writer()))
    assert json.loads((folder / "stage.json").read_text())["inputs"] == {"nested": {"x": [1, 2]}}


@pytest.mark.parametrize("resumes", [False, True])
@pytest.mark.parametrize("written", [None, 0, 30], ids=["empty", "mark begun", "half-marked"])
def test_a_stage_killed_while_its_folder_was_marked_or_deleted_is_run(tmp_path, written, resumes):
    def run(folder):
        (folder / "file").write_text("1")
        return {"file"}

    work = WorkDir(tmp_path)
    stage = Stage("one", {}, run, resumes)
    with work.locked():
        for folder in (work.folder("one", stage.key), work.root / f"one-{stage.key}.partial"):
            own(folder)
            mark = folder / MARK
            if written is None:
                mark.unlink()
            else:
                mark.write_bytes(mark.read_bytes()[:written])
        assert list(read_record(work.run_stage(stage))["files"]) == ["file"]


def test_what_somebody_else_put_in_a_stages_place_is_kept(tmp_path):
    work = WorkDir(tmp_path)
    stage = Stage("one", {}, lambda folder: None)
    with work.locked():
        foreign = work.root / f"one-{stage.key}.partial"
        foreign.mkdir()
        (foreign / "mine").write_text("1")
        with pytest.raises(ArrieroError, match="no build made it, so none deletes it"):
            work.run_stage(stage)
    assert (foreign / "mine").read_text() == "1"


@pytest.mark.parametrize("left", ["everything", "the scratch files deleted", "half of them deleted"])
def test_a_stage_killed_after_its_record_is_cleaned_and_named_without_running_again(tmp_path, left):
    work = WorkDir(tmp_path)
    partial = work.folder("s", key_of("s", {})).with_name(f"{work.folder('s', key_of('s', {})).name}.partial")

    def run(folder):
        (folder / "kept").write_text("result")
        (folder / "scratch-a").write_text("a stage needs this to go on")
        (folder / "scratch-b").write_text("and this")
        return {"kept"}

    def killed(*_: object) -> None:
        for name in {"everything": (), "half of them deleted": ("scratch-a",)}.get(left, ("scratch-a", "scratch-b")):
            (partial / name).unlink()
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("arriero.export.pipeline.stages._drop_others", killed)
        with pytest.raises(KeyboardInterrupt):
            work.run_stage(Stage("s", {}, run, resumes=True))

    def never(folder):
        raise AssertionError("the stage was finished")

    final = work.run_stage(Stage("s", {}, never, resumes=True))
    assert {path.name for path in final.iterdir()} == {"kept", "stage.json", ".arriero"}
    assert work.is_intact("s", key_of("s", {}))


def test_a_record_over_files_that_changed_since_is_no_finished_stage(tmp_path):
    work, runs = WorkDir(tmp_path), []

    def run(folder):
        runs.append(1)
        (folder / "kept").write_text("result")
        return {"kept"}

    def killed(folder: Path, *_: object) -> None:
        (folder / "kept").write_text("damage")
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("arriero.export.pipeline.stages._drop_others", killed)
        with pytest.raises(KeyboardInterrupt):
            work.run_stage(Stage("s", {}, run, resumes=True))
    assert (work.run_stage(Stage("s", {}, run, resumes=True)) / "kept").read_text() == "result"
    assert len(runs) == 2


def test_a_build_that_links_the_checkpoints_files_knows_them_afterwards_and_sees_the_next_change(tmp_path):
    small_scout(tmp_path / "model", vision=False)
    file = write_build(tmp_path / "build.yaml", "model", "text")
    build, weights = Build(load_build(file), str(file), lambda *_: None), tmp_path / "model" / "model.safetensors"
    with build.at_work():
        (tmp_path / "link").hardlink_to(weights)
    assert build.checkpoint.known_content_hash(build.work.hash_memo) == build.content
    weights.chmod(0o600)  # for the memo as good as another byte
    assert build.checkpoint.known_content_hash(build.work.hash_memo) is None
