"""A bundle for 64-bit ARM, cross-compiled here and run whole under qemu: `tests/arm/set_up.sh` makes the machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from arriero.export import emulate
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


def test_a_build_that_nothing_here_can_prove_is_refused_at_once(workshop, tmp_path, monkeypatch):
    monkeypatch.delenv(emulate.VARIABLE, raising=False)
    file = write_build(tmp_path / "build.yaml", workshop / "scout", backend="tvm")
    done = arriero("build", edit(file, "graviton3"))
    assert done.code == 3
    assert "targets[0].cpu: a bundle for aarch64 cannot be proven on this" in " ".join(done.err.split())
    assert "tests/arm/set_up.sh" in done.err
    assert not (tmp_path / "bundles" / ".work").exists()


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
