"""Publishing: no moment in which both bundles are gone for good, and nothing of the user's is renamed or deleted."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from arriero.errors import ArrieroError
from arriero.export.pipeline.failure_page import FailurePage
from arriero.export.pipeline.ownership import MARK, is_owned, own, remove_owned
from arriero.export.pipeline.stages import WorkDir
from arriero.runtimes.manifest import FileRecord
from tests.stopping import COUNTED


def fill(folder: Path, text: str) -> Path:
    """A bundle's files: a manifest that names the other."""
    (folder / "weights").mkdir(parents=True, exist_ok=True)
    (folder / "weights" / "text.safetensors").write_text(text)
    listed = {"weights/text.safetensors": asdict(FileRecord.of(folder / "weights" / "text.safetensors"))}
    (folder / "manifest.json").write_text(json.dumps({"format": 5, "files": listed, "text": text}))
    return folder


def text_of(bundle: Path) -> str:
    return (bundle / "weights" / "text.safetensors").read_text()


def publish(work: WorkDir, text: str, name: str = "int8") -> None:
    with work.locked():
        fill(work.bundles.prepare(work.output / name), text)
        work.bundles.publish(work.output / name)


def test_publish_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    work = WorkDir(tmp_path)
    for text in ("first", "second"):
        publish(work, text)
        assert text_of(tmp_path / "int8") == text
    assert sorted(p.name for p in tmp_path.iterdir()) == [".work", "int8"]


CUT = (
    """
import json, os, shutil, signal, sys
from pathlib import Path
from arriero.export.pipeline.ownership import MARK
from arriero.export.pipeline.stages import WorkDir
"""
    + COUNTED
    + """
work = WorkDir(Path(sys.argv[1]))
with work.locked():
    shutil.copytree(work.output.parent / "new", work.bundles.prepare(work.output / "int8"), dirs_exist_ok=True)
    for name in ("rename", "unlink", "rmdir"):
        setattr(Path, name, counted(getattr(Path, name)))
    shutil.rmtree = counted(shutil.rmtree)
    work.bundles.publish(work.output / "int8")
"""
)


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("steps", range(6))
def test_publish_killed_between_its_steps(tmp_path: Path, steps: int, linked: bool) -> None:
    """Before each rename and deletion that it does: afterwards there is the old bundle or the new one, whole."""
    output = tmp_path / "out"
    publish(WorkDir(output), "old")
    fill(tmp_path / "new", "new")
    if linked:
        (output / "int8").rename(tmp_path / "elsewhere")
        (output / "int8").symlink_to(tmp_path / "elsewhere")
    child = subprocess.run([sys.executable, "-c", CUT, output, str(steps)])
    assert child.returncode == (-signal.SIGKILL if steps < 5 else 0)
    with WorkDir(output).locked():
        assert text_of(output / "int8") == ("old" if steps == 0 else "new")
    publish(WorkDir(output), "newer")
    assert text_of(output / "int8") == "newer"
    assert sorted(p.name for p in output.iterdir()) == [".work", "int8"]
    assert (output / "int8").is_symlink() == linked


NAMES = [
    *("int8.old-20261125", "int8.old-0123abcd", "gone.old-0123abcd", ".deleting-notes", ".deleting-0123abcd"),
    *("other.partial", "reference-0123abcd", ".work/.deleting-0123abcd", ".work/notes-0123456789ab"),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_the_users_survives_whatever_it_is_called(tmp_path: Path, name: str) -> None:
    work = WorkDir(tmp_path)
    publish(work, "first")
    mine = tmp_path / name
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    publish(work, "second")
    with work.locked():
        work.prune([])
        work.bundles.prune([])
    assert text_of(tmp_path / "int8") == "second"
    assert [(p.name, p.read_text()) for p in mine.iterdir()] == [("thesis.txt", "years of work")]


def test_what_is_in_the_way_is_refused_and_kept(tmp_path: Path) -> None:
    work = WorkDir(tmp_path)
    mine = tmp_path / "int8.partial"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    (problem,) = work.bundles.problems(tmp_path / "int8")
    assert "int8.partial: is where the bundle is put together, and no build made it" in str(problem)
    with work.locked(), pytest.raises(ArrieroError, match="in the way of the build"):
        work.bundles.prepare(tmp_path / "int8")
    assert (mine / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("written", [0, 1, 40])
def test_a_kill_while_the_mark_is_written_is_in_nobodys_way(tmp_path: Path, written: int) -> None:
    work = WorkDir(tmp_path)
    staging = tmp_path / "int8.partial"
    own(staging)
    mark = staging / MARK
    mark.write_bytes(mark.read_bytes()[:written])
    assert work.bundles.problems(tmp_path / "int8") == []
    publish(work, "first")
    assert text_of(tmp_path / "int8") == "first"
    assert not staging.exists()
    (staging / "left").mkdir(parents=True)
    with pytest.raises(ArrieroError, match="no build made it"):
        own(staging)


def test_a_file_that_is_called_like_the_mark_is_the_users(tmp_path: Path) -> None:
    mine = tmp_path / "int8.partial" / MARK
    mine.parent.mkdir()
    mine.write_text("my own notes")
    assert WorkDir(tmp_path).bundles.problems(tmp_path / "int8")
    with pytest.raises(ArrieroError, match="no build made it"):
        own(mine.parent)
    assert mine.read_text() == "my own notes"


def test_files_that_a_user_put_into_a_bundle_are_never_deleted(tmp_path: Path) -> None:
    work = WorkDir(tmp_path)
    publish(work, "first")
    (tmp_path / "int8" / "notes.txt").write_text("mine")
    with pytest.raises(ArrieroError, match=r"int8: holds files that are not the bundle's: notes\.txt\. Move them away"):
        publish(work, "second")
    assert (text_of(tmp_path / "int8"), (tmp_path / "int8" / "notes.txt").read_text()) == ("first", "mine")
    (tmp_path / "int8" / "notes.txt").unlink()
    publish(work, "second")
    assert text_of(tmp_path / "int8") == "second"


def test_a_bundle_whose_manifest_is_damaged_is_replaced(tmp_path: Path) -> None:
    """What was published is remembered; without that, the folder is the user's."""
    work = WorkDir(tmp_path)
    publish(work, "first")
    (tmp_path / "int8" / "manifest.json").write_text("{")
    publish(work, "second")
    assert text_of(tmp_path / "int8") == "second"
    (tmp_path / "int8" / "manifest.json").write_text("{")
    work.bundles.ledger.unlink()
    with pytest.raises(ArrieroError, match="is in the bundle's place and is no bundle"):
        publish(work, "third")


def test_a_bundle_behind_a_link_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    work = WorkDir(tmp_path / "out")
    publish(work, "first")
    shutil.move(tmp_path / "out" / "int8", tmp_path / "store")
    (tmp_path / "out" / "int8").symlink_to(tmp_path / "store")
    for text in ("second", "third"):
        publish(work, text)
        assert (tmp_path / "out" / "int8").is_symlink()
        assert text_of(tmp_path / "store") == text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "store"]


@pytest.mark.parametrize("target", ["nowhere/at/all", "int8"])
def test_a_link_to_nowhere_is_refused_each_time_alike(tmp_path: Path, target: str) -> None:
    (tmp_path / "int8").symlink_to(target)
    for _ in range(2):
        work = WorkDir(tmp_path)
        with work.locked():
            (problem,) = work.bundles.problems(tmp_path / "int8")
        assert "int8: is a symbolic link to nowhere. Remove the link" in str(problem)


def test_a_copy_of_a_marked_folder_is_the_users(tmp_path: Path) -> None:
    own(tmp_path / "int8.partial")
    shutil.copytree(tmp_path / "int8.partial", tmp_path / "backup")
    assert (is_owned(tmp_path / "int8.partial"), is_owned(tmp_path / "backup")) == (True, False)
    with pytest.raises(ArrieroError, match="none deletes it"):
        remove_owned(tmp_path / "backup")
    remove_owned(tmp_path / "int8.partial")
    remove_owned(tmp_path / "int8.partial")  # it is gone
    assert [p.name for p in tmp_path.iterdir()] == ["backup"]


@pytest.mark.parametrize(
    "said",
    [
        {"files": ["thesis.txt"]},
        {"format": 5, "files": ["thesis.txt"]},
        {"format": 5, "files": {"thesis.txt": {}}},
        {"files": {"thesis.txt": {"bytes": 2, "sha256": "0" * 64}}},
    ],
)
@pytest.mark.parametrize("name", ["manifest.json", "record.json"])
@pytest.mark.parametrize("published", [False, True])
def test_a_manifest_of_the_users_makes_no_folder_ours(
    tmp_path: Path, name: str, said: dict[str, object], published: bool
) -> None:
    work = WorkDir(tmp_path)
    if published:
        publish(work, "ours")
        shutil.rmtree(tmp_path / "int8")
    (tmp_path / "int8").mkdir()
    (tmp_path / "int8" / "thesis.txt").write_text("my")
    (tmp_path / "int8" / name).write_text(json.dumps(said))
    with pytest.raises(ArrieroError, match="is in the bundle's place and is no bundle"):
        publish(work, "new")
    assert (tmp_path / "int8" / "thesis.txt").read_text() == "my"
    (tmp_path / "int8" / "thesis.txt").unlink()
    with pytest.raises(ArrieroError, match="is in the bundle's place and is no bundle"):
        publish(work, "new")
    assert json.loads((tmp_path / "int8" / name).read_text()) == said


def test_a_page_of_the_users_is_neither_deleted_nor_written_over(tmp_path: Path) -> None:
    page = FailurePage.of(tmp_path, "int8")
    assert page.problems() == []
    page.path.write_text("<p>mine</p>")
    page.remove()
    assert page.path.read_text() == "<p>mine</p>"
    (problem,) = page.problems()
    assert "int8.failed-parity.html: is where the page of a failed parity goes, and no build made it" in str(problem)
