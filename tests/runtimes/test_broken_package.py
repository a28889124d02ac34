"""Packages that are there and do not load: the machine lacks something, and the message says what."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest

from arriero.errors import UNEXPECTED, MachineLacks
from arriero.export import __main__ as command
from arriero.export.pipeline.stages import machine_limits
from arriero.export.store.objects import UrlStore
from arriero.graphs.sources.gguf import GgufFile
from arriero.runtimes.broken_package import naming_broken_packages
from arriero.runtimes.load_onnxruntime import load_onnxruntime
from arriero.runtimes.processor.documents import read_document
from arriero.runtimes.processor.video import read_video

GONE = "cannot open shared object file: No such file or directory"
AGAIN = "Reinstall it: pip install --force-reinstall 'onnxruntime"
BROKEN = {  # what the package's first line does -> the reason, and what to do
    f"raise OSError('libonnx.so.1: {GONE}')": (
        f"libonnx.so.1: {GONE}",
        "Install the library libonnx.so.1 (your system",
    ),
    f"raise ImportError('libgomp.so.1: {GONE}')": (f"libgomp.so.1: {GONE}", "`apt-get install libgomp1` on Debian"),
    "raise RuntimeError('bad build\\nmore')": ("bad build", AGAIN),
    "1 / 0": ("division by zero", AGAIN),
    "import onnxruntime.capi_": ("No module named 'onnxruntime.capi_'", AGAIN),
    "from json import nothing": ("cannot import name 'nothing' from 'json'", AGAIN),
}


@pytest.fixture
def replace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put a package of one line in the place of an installed one."""

    def put(name: str, line: str, *ours: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"{line}\n")
        monkeypatch.syspath_prepend(tmp_path)
        for module in (name, *ours):
            monkeypatch.delitem(sys.modules, module, raising=False)

    return put


@pytest.mark.parametrize("line", BROKEN)
def test_a_package_that_does_not_load_is_named_with_reason_and_remedy(replace, line: str) -> None:
    replace("onnxruntime", line)
    reason, remedy = BROKEN[line]
    with pytest.raises(MachineLacks) as caught:
        load_onnxruntime()
    assert caught.value.what.startswith(f"the package onnxruntime is installed and does not load: {reason}")
    assert remedy in str(caught.value.remedy)
    assert "pip install --force-reinstall 'onnxruntime" in str(caught.value.remedy)


def test_one_that_is_not_there_is_to_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MachineLacks, match=r"onnxruntime is not installed.*pip install 'arriero\[onnxruntime\]'"):
        load_onnxruntime()


READERS = {  # what asks for the package -> of whose parts one is missing
    "av": lambda path: read_video(path, 1),
    "pypdfium2": read_document,
    "fsspec": lambda path: UrlStore(f"file://{path}"),
    "gguf": GgufFile.open,
}


@pytest.mark.parametrize("package", READERS)
def test_one_of_which_a_part_is_missing_is_not_one_to_be_installed(replace, tmp_path: Path, package: str) -> None:
    replace(package, f"import {package}.absent_part")
    with (
        pytest.raises(MachineLacks, match=rf"installed and does not load: No module named '{package}\.absent_part'"),
        naming_broken_packages(),
    ):
        READERS[package](tmp_path / "file")


OURS = ("arriero.export.compile.tvm", "arriero.export.compile.relax.import_graph")


def test_a_stage_that_imports_one_says_that_the_machine_lacks_it(replace, tmp_path: Path) -> None:
    replace("tvm", f"raise OSError('libLLVM.so: {GONE}')", *OURS)
    with (
        pytest.raises(MachineLacks, match=r"the package apache-tvm is installed and does not load: libLLVM\.so"),
        machine_limits("in stage lower-x", tmp_path),
    ):
        import_module(OURS[0])


def test_the_command_ends_with_what_the_machine_lacks_wherever_it_is_imported(
    replace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace("tvm", "raise OSError('odd')", *OURS)
    for function, code in ((lambda *_, **__: import_module(OURS[0]), 3), (lambda *_, **__: int("x"), UNEXPECTED)):
        monkeypatch.setattr("arriero.export.build_file.schema.json_schema", function)
        monkeypatch.setattr(sys, "argv", ["arriero", "schema"])
        with pytest.raises(SystemExit) as left:
            command.main()
        assert left.value.code == code
        told = capsys.readouterr().err
        assert ("apache-tvm is installed and does not load: odd" in told) == (code == 3)
