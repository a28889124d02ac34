"""A bundle for 64-bit ARM, cross-compiled here and run whole under qemu: `tests/arm/set_up.sh` makes the machine."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from arriero import load
from arriero.errors import ArrieroError, MachineLacks
from arriero.export.proof import emulate
from arriero.profiles.recipe import shipped
from arriero.runtimes.integrity import open_manifest
from tests.command import arriero, write_build

pytestmark = pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine is 64-bit ARM itself")
MACHINE = os.environ.get(emulate.VARIABLE)
needs_machine = pytest.mark.skipif(
    MACHINE is None, reason=f"needs 64-bit ARM under qemu: run tests/arm/set_up.sh FOLDER and set {emulate.VARIABLE}"
)


def edit(file: Path, cpu: str) -> Path:
    file.write_text(file.read_text().replace("backend: tvm,", f"backend: tvm, cpu: {cpu},"))
    return file


@pytest.fixture(scope="module")
def bundles(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles `fp32` and `int8` of the workshop's checkpoint, proven under emulation by the build itself."""
    pytest.importorskip("tvm", reason="needs apache-tvm: pip install 'arriero[tvm]'")
    folder = tmp_path_factory.mktemp("arm")
    profiles = ("fp32", str(workshop / "int8.yaml"))
    file = write_build(folder / "build.yaml", workshop / "scout", profiles=profiles, samples=8, backend="tvm")
    file.write_text(file.read_text().replace("context:", "kv_cache: float32, context:"))  # as this machine's have it
    built = arriero("build", edit(file, "arm64-v8.6-i8mm"))
    assert built.code == 0, built.err
    return folder / "bundles"


@needs_machine
def test_the_emulated_bundle_has_the_parity_of_this_machines(bundles, tvm_workshop):
    for name in ("fp32", "int8"):
        there, here = (
            {row["metric"]: row["value"] for row in json.loads((place / name / "parity.json").read_text())["rows"]}
            for place in (bundles, tvm_workshop / "bundles")
        )
        assert there["router_agreement"] == pytest.approx(here["router_agreement"], abs=0.01)
        assert there["same_top_token"] == pytest.approx(here["same_top_token"], abs=0.01)
        assert there["logits_kl_mean"] == pytest.approx(here["logits_kl_mean"], rel=0.05, abs=1e-9)
        if name == "fp32":
            assert there["router_agreement"] == there["same_top_token"] == 1.0
            assert there["logits_max_abs_error"] < 1e-4


@needs_machine
def test_the_whole_runtime_answers_there_as_here(bundles, tvm_workshop):
    script = """
import platform, sys
import numpy as np
import arriero
with arriero.load(sys.argv[1], threads=1) as session:
    image = np.random.default_rng(1).integers(0, 255, (40, 50, 3), np.uint8)
    print(session.generate("What is 17 + 25?", [image], max_tokens=8).token_ids)
print(platform.machine(), file=sys.stderr)
"""
    assert MACHINE is not None
    command = [sys.executable, "-P", "-c", script, str(tvm_workshop / "bundles" / "fp32")]
    here = subprocess.run(command, capture_output=True, text=True, check=True)
    command = emulate.emulated(Path(MACHINE), ["-c", script, str(bundles / "fp32")])
    there = subprocess.run(command, capture_output=True, text=True, check=True, cwd=MACHINE)
    assert there.stderr.split()[-1] == "aarch64"
    assert there.stdout == here.stdout


@needs_machine
def test_the_bundle_is_refused_on_this_machine(bundles):
    done = arriero("run", bundles / "fp32", "hello")
    assert done.code == 3
    assert "built for aarch64" in done.err


@pytest.fixture(scope="module")
def unproven(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build of one target with a calibrated profile, on a machine that knows no emulation."""
    pytest.importorskip("tvm", reason="needs apache-tvm: pip install 'arriero[tvm]'")
    folder = tmp_path_factory.mktemp("unproven")
    text = shipped()["int4"].read_text()
    changes = {
        "kl_over_rtn: 0.5": "kl_over_rtn: 0.99",
        "minimum_tokens: 16": "minimum_tokens: 1",
        "block: 64": "block: 32",
    }
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "int4.yaml").write_text(text)
    profiles = (str(folder / "int4.yaml"),)
    file = write_build(folder / "build.yaml", workshop / "scout", profiles=profiles, samples=8, backend="tvm")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(emulate.VARIABLE, raising=False)
        built = arriero("build", edit(file, "arm64-v8.6-i8mm"), "--json")
        assert built.code == 0, built.err
        assert built.json["unproven"] == {str(folder / "bundles" / "int4"): "a machine with aarch64 processors"}
    return folder


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine, without an emulated one."""
    monkeypatch.delenv(emulate.VARIABLE, raising=False)


def test_what_this_machine_cannot_run_is_published_and_marked(unproven: Path, alone: None) -> None:
    bundle = unproven / "bundles" / "int4"
    manifest = open_manifest(bundle, full=True)
    assert not manifest.proven
    assert not (bundle / "parity.json").exists()
    assert manifest.proof.rtn is not None  # measured on this processor: what rounding costs is the same on every one
    assert manifest.proof.rtn.mean > 0
    again = arriero("build", unproven / "build.yaml")
    assert again.code == 0
    assert "published, unproven" in again.out
    assert "arriero parity" in again.out
    strict = arriero("build", unproven / "build.yaml", "--require-proof")
    assert (strict.code, "not proven" in strict.err) == (3, True)
    inspected = arriero("inspect", bundle)
    assert inspected.code == 0
    assert "not proven" in inspected.out


def test_an_unproven_bundle_is_refused_until_its_proof_is_asked_for(unproven: Path, alone: None) -> None:
    bundle = unproven / "bundles" / "int4"
    with pytest.raises(ArrieroError, match=r"the bundle is not proven.*arriero parity"):
        load(bundle)
    with pytest.raises(MachineLacks, match="built for aarch64"):  # and where it is not, only the machine is in the way
        load(bundle, allow_unproven=True)
    recorded = arriero("parity", bundle, "--recorded")
    assert (recorded.code, "not proven" in recorded.err) == (2, True)
    measured = arriero("parity", bundle)
    assert (measured.code, "cannot be run on this" in measured.err) == (3, True)


@needs_machine
def test_parity_on_the_device_completes_the_proof_and_the_build_takes_it(unproven: Path, tmp_path: Path) -> None:
    assert MACHINE is not None
    bundle = tmp_path / "bundles" / "int4"
    shutil.copytree(unproven / "bundles" / "int4", bundle)
    before = (bundle / "manifest.json").read_bytes()
    apart = tmp_path / "proof"
    command = emulate.emulated(
        Path(MACHINE), ["-m", "arriero.export", "parity", str(bundle), "--output", str(apart), "--json"]
    )
    done = subprocess.run(command, capture_output=True, text=True, cwd=MACHINE, check=False)
    assert done.returncode == 0, done.stderr
    rows = {row["metric"]: row["status"] for row in json.loads(done.stdout)["rows"]}
    assert (rows["kl_over_rtn"], rows["same_prompt"]) == ("pass", "pass")
    assert (bundle / "manifest.json").read_bytes() == before  # it was not written to
    assert {path.name for path in apart.iterdir()} == {"manifest.json", "parity.json", "parity.html"}
    for path in apart.iterdir():
        shutil.copy(path, bundle)
    assert open_manifest(bundle, full=True).proven
    assert "passed" in arriero("parity", bundle, "--recorded").out
    published = unproven / "bundles" / "int4"
    kept = tmp_path / "kept"
    shutil.copytree(published, kept)
    try:
        shutil.copytree(bundle, published, dirs_exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv(emulate.VARIABLE, raising=False)
            taken = arriero("build", unproven / "build.yaml", "--json")
        assert (taken.code, taken.json["unproven"]) == (0, {})
    finally:
        shutil.rmtree(published)
        shutil.copytree(kept, published)


def test_each_source_tree_is_itself_on_a_shared_machine(tmp_path, monkeypatch):
    paths = []
    for name in ("one", "two", "one"):
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.setattr(emulate, "PACKAGE", tmp_path / name)
        (path,) = (word for word in emulate.emulated(tmp_path, []) if word.startswith("PYTHONPATH="))
        ours = Path(path.removeprefix("PYTHONPATH=").partition(":")[0])
        assert (ours / "arriero").resolve() == tmp_path / name
        paths.append(ours)
    assert paths[0] == paths[2] != paths[1]
