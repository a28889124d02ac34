"""The doctor: this machine passes, and each thing taken away is found with the way to get it."""

import io
import json
import platform
import re
import sys
import tomllib
from pathlib import Path

import pytest
from rich.console import Console

from arriero.errors import ArrieroError
from arriero.export.cli.show_diagnosis import show_diagnosis
from arriero.export.machine import doctor
from arriero.export.machine.doctor import diagnose
from arriero.traits import SHARED_PACKAGES, TRAITS

ROOT = Path(__file__).resolve().parents[3]


def test_this_machine_can_build(tmp_path):
    found = diagnose(tmp_path)
    assert found.can("build", "onnxruntime")
    assert found.can("run", "onnxruntime")
    assert found.exit_code() == found.exit_code("onnxruntime") == 0
    assert {"python", "cpu", "memory", "disk", "torch"} <= {check.name for check in found.machine}
    providers = next(check for check in found.backends["onnxruntime"] if check.name == "providers")
    assert "CPUExecutionProvider" in providers.found


def test_unknown_backend(tmp_path):
    with pytest.raises(ArrieroError, match=r"no backend 'openvino'; expected one of onnxruntime, tvm"):
        diagnose(tmp_path, "openvino")


def test_lowest_versions_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    lowest = dict(re.findall(r"^([\w-]+)[=>]=([\d.]*\d)", "\n".join(listed), re.M))
    packages = [*SHARED_PACKAGES, *(package for traits in TRAITS.values() for package in traits.packages)]
    assert {package.name: package.least for package in packages} == {
        package.name: lowest[package.name] for package in packages
    }


@pytest.mark.parametrize(
    ("library", "version", "remedy", "builds", "runs"),
    [
        ("torch", None, "pip install 'arriero[export]' (it needs torch 2.13 or newer)", False, True),
        ("torch", "2.9.1+cpu", "pip install 'arriero[export]'", False, True),
        ("onnxruntime", "1.31.4", "pip install 'arriero[onnxruntime]'", False, False),
        ("onnxruntime", None, "pip install 'arriero[onnxruntime]'", False, False),
        ("tokenizers", None, "pip install 'arriero'", False, False),
        ("av", None, "pip install 'arriero[video]'", True, True),
    ],
)
def test_a_missing_or_old_library(tmp_path, monkeypatch, library, version, remedy, builds, runs):
    real = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda name: version if name == library else real(name))
    found = diagnose(tmp_path, "onnxruntime")
    check = next(c for c in (*found.machine, *found.backends["onnxruntime"]) if c.name == library)
    assert check.status == "missing"
    assert check.remedy is not None
    assert check.remedy.startswith(remedy)
    assert (found.can("build", "onnxruntime"), found.can("run", "onnxruntime")) == (builds, runs)
    assert found.exit_code("onnxruntime") == (0 if builds else 3)
    shown = render(found)
    assert library in shown
    assert check.remedy[:20] in shown


def test_a_machine_of_one_core_has_one_core(tmp_path, monkeypatch):
    monkeypatch.setattr("arriero.runtimes.cpu.usable_cores", lambda: 1)
    (check,) = (one for one in diagnose(tmp_path).machine if one.name == "cpu")
    assert ", 1 core, " in check.found


def test_a_library_that_does_not_load(tmp_path, monkeypatch):
    (tmp_path / "onnxruntime.py").write_text("raise OSError('bad build')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnxruntime")
    found = diagnose(tmp_path, "onnxruntime")
    check = found.backends["onnxruntime"][-1]
    assert check.found == "the package onnxruntime is installed and does not load: bad build"
    assert check.remedy.startswith("Reinstall it: pip install --force-reinstall 'onnxruntime")
    assert found.exit_code("onnxruntime") == 3


def test_a_cross_compiler_is_optional_and_the_machines_own_is_not(tmp_path, monkeypatch):
    pytest.importorskip("tvm_ffi", reason="needs apache-tvm: pip install 'arriero[tvm]'")
    found = diagnose(tmp_path, "tvm")
    assert found.can("run", "tvm")
    assert "tvm runtime loads" in {check.name for check in found.backends["tvm"]}
    monkeypatch.setattr("shutil.which", lambda name: None)
    bare = diagnose(tmp_path, "tvm")
    compilers = {check.name: check for check in bare.backends["tvm"] if check.name.startswith("compiler")}
    assert sorted(len(check.needed_for) for check in compilers.values()) == [0, 1]
    assert all("apt-get install g++" in str(check.remedy) for check in compilers.values())
    assert (bare.can("build", "tvm"), bare.can("run", "tvm")) == (False, True)


def test_a_compiler_that_is_there_and_too_old_is_none(tmp_path, monkeypatch):
    pytest.importorskip("tvm_ffi", reason="needs apache-tvm: pip install 'arriero[tvm]'")
    (tmp_path / "g++").write_text("#!/bin/sh\necho 'error: unrecognized option -std=c++17' >&2; exit 1")
    (tmp_path / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = diagnose(tmp_path, "tvm")
    (check,) = (one for one in found.backends["tvm"] if one.name == f"compiler for {platform.machine()}")
    assert "cannot compile our kernels: error: unrecognized option" in check.found
    assert check.remedy.startswith("Update it")
    assert not found.can("build", "tvm")


@pytest.mark.parametrize(
    ("function", "name", "words"),
    [("available_memory", "memory", "1 KiB free of"), ("free_disk", "disk", "1 KiB free in")],
)
def test_too_little_memory_or_disk(tmp_path, monkeypatch, function, name, words):
    monkeypatch.setattr(doctor, function, lambda *_: 1024)
    found = diagnose(tmp_path)
    check = next(c for c in found.machine if c.name == name)
    assert check.status == "missing"
    assert words in check.found
    assert "Free some" in check.remedy
    assert found.exit_code() == 3


CPU = {
    "x86_64": ({"fpu", "avx2", "avx512_vnni"}, "avx512_vnni, avx2", "ok"),
    "aarch64": ({"asimd", "asimddp"}, "asimddp, asimd", "ok"),
    "i686": ({"fpu", "sse2"}, "none", "missing"),
    "riscv64": (set(), "not known on this system", "ok"),
}


@pytest.mark.parametrize("architecture", CPU)
def test_processors(tmp_path, monkeypatch, architecture):
    have, features, status = CPU[architecture]
    monkeypatch.setattr(doctor, "cpu_features", lambda: frozenset(have))
    monkeypatch.setattr(doctor, "architecture", lambda: architecture)
    check = next(c for c in diagnose(tmp_path, "onnxruntime").machine if c.name == "cpu features")
    assert (check.found, check.status) == (features, status)


def test_json_for_machines(tmp_path):
    data = json.loads(json.dumps(diagnose(tmp_path, "onnxruntime").to_json()))
    assert data["can"] == {"onnxruntime": {"build": True, "run": True}}
    assert {"name", "status", "found", "needed_for", "remedy"} == set(data["machine"][0])


def render(found: doctor.Diagnosis) -> str:
    console = Console(file=io.StringIO(), width=160)
    show_diagnosis(found, console)
    return console.file.getvalue()


def test_table_for_people(tmp_path):
    shown = render(diagnose(tmp_path))
    for words in ("python", "CPUExecutionProvider", "onnxruntime: build yes, run yes"):
        assert words in shown


BUILD_TOOLS = [package.name for package in SHARED_PACKAGES if package.extra == "export"]


@pytest.mark.parametrize(("gone", "code"), [((), 0), (("onnxruntime",), 3)])
def test_a_device_with_a_runtime_alone_can_run_bundles(tmp_path, monkeypatch, gone, code):
    """As `pip install 'arriero[onnxruntime]'` leaves it: no torch, no onnx. That is no lack of a device."""
    real = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name in (*BUILD_TOOLS, *gone) else real(name))
    found = diagnose(tmp_path, "onnxruntime")
    assert (found.is_device, found.exit_code("onnxruntime"), found.exit_code()) == (True, code, code)
    told = " ".join(render(found).split())
    assert ("onnxruntime: can run bundles; cannot build: needs torch, onnx, onnx-ir, onnxscript" in told) == (not gone)


def test_the_backends_that_are_installed(monkeypatch):
    monkeypatch.setattr(doctor, "version_of", lambda name: "9.9" if "tvm" in name else None)
    assert doctor.installed_backends() == ("tvm",)
    monkeypatch.setattr(doctor, "version_of", lambda name: None)
    assert doctor.installed_backends() == tuple(TRAITS)
