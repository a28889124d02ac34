"""A bundle that is replaced at its path: what is loaded afterwards is the new one, what is open stays the old one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import arriero
from arriero.errors import ArrieroError
from arriero.runtimes.api import open_bundle_backend
from arriero.runtimes.integrity import open_manifest
from arriero.runtimes.private_library import PrivateLibrary
from arriero.runtimes.unchanged import Unchanged

IDS = np.arange(5, 25)


@pytest.fixture(params=["onnxruntime", "tvm"])
def bundles(request: pytest.FixtureRequest) -> Path:
    """The folder of `fp32` and `int8`, built for one backend."""
    name = "workshop" if request.param == "onnxruntime" else "tvm_workshop"
    return request.getfixturevalue(name) / "bundles"


@pytest.fixture
def truth(bundles):
    """What each bundle computes at its own path."""
    logits = {}
    for name in ("fp32", "int8"):
        with arriero.load(bundles / name, threads=1) as session:
            logits[name] = session.logits(IDS).logits
    assert not np.array_equal(logits["fp32"], logits["int8"])
    return logits


def replace(path: Path, bundle: Path) -> None:
    """Put `bundle` in the place of the one at `path`, as a build publishes it."""
    if path.exists():
        path.rename(path.with_name(f"{path.name}.replaced"))
        shutil.rmtree(path.with_name(f"{path.name}.replaced"))
    shutil.copytree(bundle, path)


def test_a_replaced_bundle_answers_with_its_new_code(bundles, truth, tmp_path):
    path = tmp_path / "bundle"
    for name in ("fp32", "int8", "fp32"):
        replace(path, bundles / name)
        with arriero.load(path, threads=1) as session:
            assert np.array_equal(session.logits(IDS).logits, truth[name])


def test_a_session_that_is_open_keeps_what_it_loaded_beside_the_new_one(bundles, truth, tmp_path):
    path = tmp_path / "bundle"
    replace(path, bundles / "fp32")
    with arriero.load(path, threads=1) as old:
        replace(path, bundles / "int8")
        with arriero.load(path, threads=1) as new:
            assert np.array_equal(new.logits(IDS).logits, truth["int8"])
            assert np.array_equal(old.logits(IDS).logits, truth["fp32"])
        assert np.array_equal(old.logits(IDS).logits, truth["fp32"])


def test_a_vision_tower_of_another_build_joins_no_open_session(bundles, tmp_path):
    path = tmp_path / "bundle"
    replace(path, bundles / "fp32")
    with arriero.load(path, threads=1) as session:
        replace(path, bundles / "int8")
        if (code := path / "vision.so").exists():  # of one model it is the same in every build; of this one it is not
            content = code.read_bytes()
            code.unlink()
            code.write_bytes(content + b"x")
        for _ in range(2):  # the first refusal leaves nothing behind
            with pytest.raises(ArrieroError, match=r"changed or replaced.*Load the bundle again"):
                session.vision(np.zeros((1, 3, 32, 32), np.float32))


def test_a_vision_tower_opens_late_where_only_a_proof_was_written(bundles, tmp_path):
    path = tmp_path / "bundle"
    replace(path, bundles / "fp32")
    with arriero.load(path, threads=1) as session:
        for name in ("parity.json", "parity.html", "manifest.json"):
            (path / name).write_text((path / name).read_text())
        assert session.vision(np.zeros((1, 3, 32, 32), np.float32)).shape[0] > 0


@pytest.mark.parametrize("part", ["text", "embed", "vision"])
def test_a_library_changed_after_the_check_is_never_opened(tvm_workshop, tmp_path, part):
    """Every library, the one of the first image too, is hashed again when it is opened."""
    folder = tmp_path / "bundle"
    shutil.copytree(tvm_workshop / "bundles" / "fp32", folder)
    manifest = open_manifest(folder)
    library = folder / f"{part}.so"
    content = library.read_bytes()
    library.unlink()
    library.write_bytes(content[:-1] + b"x")
    with pytest.raises(ArrieroError, match=rf"{part}\.so: the library is another one than was checked"):
        open_bundle_backend(manifest)


def test_a_library_overwritten_in_its_place_changes_nothing_that_is_open(tvm_workshop, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(tvm_workshop / "bundles" / "fp32", folder)
    with arriero.load(folder, threads=1) as session:
        before = session.logits(IDS).logits
        with (folder / "text.so").open("r+b") as file:
            file.write(bytes(os.path.getsize(folder / "text.so")))
        assert np.array_equal(session.logits(IDS).logits, before)


def test_a_private_library_is_opened_under_a_name_that_never_comes_back(tmp_path):
    """Systems keep what they have mapped by its name."""
    path = tmp_path / "a.so"
    path.write_bytes(b"code")
    library = PrivateLibrary(path, None)
    names = [library.open(lambda name: (name, Path(name).read_bytes())) for _ in range(300)]
    assert len({name for name, _ in names}) == 300
    assert {content for _, content in names} == {b"code"}
    path.write_bytes(b"edoc")
    with pytest.raises(ArrieroError, match="another one than was checked"):
        library.open(str)
    with pytest.raises(ArrieroError, match="another one than was checked"):
        PrivateLibrary(path, "0" * 64)


@pytest.mark.parametrize("how", ["changed", "replaced", "gone"])
def test_files_that_changed_are_named(tmp_path, how):
    (tmp_path / "weights").mkdir()
    for name in ("text.onnx", "weights/a", "parity.json"):
        (tmp_path / name).write_text("1")
    files = Unchanged(tmp_path)
    (tmp_path / "parity.json").write_text("22")
    (tmp_path / "another").touch()
    files.check()
    file = tmp_path / "weights" / "a"
    if how == "changed":
        os.utime(file, ns=(1, 1))
    else:
        file.unlink()
    if how == "replaced":
        (tmp_path / "new").write_text("1")
        (tmp_path / "new").rename(file)
    with pytest.raises(ArrieroError, match=r"while it was open: weights/a; .*Load the bundle again"):
        files.check()
