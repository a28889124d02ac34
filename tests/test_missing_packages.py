"""What a device says where a package is missing: the extra that brings it there, never what builds need."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# Only what `pip install arriero` and one runtime bring can be imported, and less what a case takes away.
SCRIPT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
from arriero.export.__main__ import main
main()
"""
BUILD_ONLY = ("torch", "onnx", "onnx_ir", "onnxscript", "transformers", "yaml", "ml_dtypes", "numba", "llvmlite")
BUILD_ONLY += ("tensorrt", "cuda")


def without(packages: tuple[str, ...], *arguments: object) -> subprocess.CompletedProcess[str]:
    script = SCRIPT.format(absent=(*BUILD_ONLY, *packages))
    return subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture
def bundle(workshop: Path, tmp_path: Path) -> Path:
    shutil.copytree(workshop / "bundles" / "fp32", tmp_path / "fp32")
    return tmp_path / "fp32"


@pytest.mark.parametrize(
    ("absent", "arguments", "extra"),
    [
        (("onnxruntime",), ("run", "BUNDLE", "hello"), "arriero[onnxruntime]"),
        (("onnxruntime",), ("parity", "BUNDLE"), "arriero[onnxruntime]"),
        (("av",), ("run", "BUNDLE", "hello", "--video", "clip.mp4"), "arriero[video]"),
        (("pypdfium2",), ("run", "BUNDLE", "hello", "--document", "form.pdf"), "arriero[documents]"),
        (("starlette",), ("serve", "BUNDLE"), "arriero[server]"),
        (("uvicorn",), ("serve", "BUNDLE"), "arriero[server]"),
        (("prometheus_client",), ("serve", "BUNDLE"), "arriero[server]"),
        (("fsspec",), ("push", "BUNDLE", "memory://store"), "arriero[store]"),
        (("rich",), ("inspect", "BUNDLE"), "'arriero'"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(bundle, absent, arguments, extra):
    run = without(absent, *(bundle if each == "BUNDLE" else each for each in arguments))
    assert run.returncode == 3, run.stderr
    assert "Traceback" not in run.stderr
    assert f"pip install {extra if extra.startswith(chr(39)) else repr(extra)}" in run.stderr
    assert "arriero[export]" not in run.stderr
    assert "torch" not in run.stderr.lower()


def test_commands_of_a_device_need_nothing_of_a_build(bundle, tmp_path):
    store = tmp_path / "store"
    for arguments in (
        ("run", bundle, "hello", "--max-tokens", "2"),
        ("inspect", bundle),
        ("parity", bundle),
        ("push", bundle, store),
        ("pull", store),
        ("pull", store, tmp_path / "pulled", "--name", "fp32"),
    ):
        run = without(("fsspec",), *arguments)
        assert run.returncode in (0, 1), run.stderr
        assert "Traceback" not in run.stderr
