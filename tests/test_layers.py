"""The layers stay apart: who may import whom, read from the sources; and what a running bundle loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("profiles", "runtimes", "graphs", "export", "models")
MAY_IMPORT = {
    "profiles": {"errors", "profiles"},
    "runtimes": {"errors", "runtimes"},
    "graphs": {"errors", "profiles", "graphs"},
    "export": {"errors", "version", "profiles", "runtimes", "graphs", "export"},
    "models": {"errors", "version", *LAYERS},
}
# The reference needs the model's definition; nothing that a bundle runs on imports it.
EXCEPTIONS = {"runtimes/torch.py": {"graphs"}}
# What an edge device has: everything else would have to be installed there.
AT_RUN_TIME = {"numpy", "onnxruntime", "tvm_ffi", "cuda", "tokenizers", "jinja2", "PIL", "av", "rich"}
HEAVY = {"torch", "onnx", "onnx_ir", "onnxscript", "transformers", "pydantic", "ruamel", "safetensors", "typer", "rich"}
MAX_LINES = 600

SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.py"), *(file for layer in (*LAYERS, "tests") for file in (ROOT / layer).rglob("*.py")))
)


def imported(source: str) -> Iterator[str]:
    """Full names of the modules that a file imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse((ROOT / source).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}:{node.lineno} imports relatively"
            # `from arriero import graphs` imports arriero.graphs
            names = [f"arriero.{name.name}" for name in node.names] if node.module == "arriero" else [node.module]
            yield from (name for name in names if name)


def test_every_layer_has_sources():
    assert {source.partition("/")[0] for source in SOURCES} >= {*LAYERS, "tests"}


@pytest.mark.parametrize("source", [source for source in SOURCES if source.startswith(tuple(f"{x}/" for x in LAYERS))])
def test_a_layer_imports_only_what_it_may(source):
    layer = source.partition("/")[0]
    allowed = MAY_IMPORT[layer] | EXCEPTIONS.get(source, set())
    ours = {name.split(".")[1] for name in imported(source) if name.startswith("arriero.")}
    assert ours <= allowed


@pytest.mark.parametrize("source", [s for s in SOURCES if s.startswith("runtimes/") and s not in EXCEPTIONS])
def test_the_runtime_needs_little(source):
    modules = {name.partition(".")[0] for name in imported(source)}
    assert modules - {"arriero"} - set(sys.stdlib_module_names) <= AT_RUN_TIME


def test_only_models_imports_models():
    importers = {source for source in SOURCES if any(name.startswith("arriero.models") for name in imported(source))}
    assert {source.partition("/")[0] for source in importers} <= {"models", "tests"}


@pytest.mark.parametrize("source", SOURCES)
def test_nobody_imports_a_bare_layer(source):
    """`import export` would be a second copy of `arriero.export`."""
    assert not {name.partition(".")[0] for name in imported(source)} & set(LAYERS)


@pytest.mark.parametrize("source", SOURCES)
def test_files_stay_short(source):
    assert len((ROOT / source).read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_the_gpu_runtimes_load_nothing_before_they_are_asked():
    """Not the heavy libraries ever, and NVIDIA's only with a bundle."""
    script = f"""
import sys
import arriero.runtimes.tensorrt, arriero.runtimes.tensorrt_rtx
print(sorted(({HEAVY!r} | {{"cuda", "tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"}}) & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("images", ["None", "np.zeros((40, 50, 3), np.uint8)"], ids=["text", "image"])
def test_a_bundle_answers_without_the_heavy_libraries(workshop, images):
    script = f"""
import sys
import numpy as np
import arriero
with arriero.load({str(workshop / "bundles" / "fp32")!r}, threads=1) as session:
    print(len(session.generate("What is 17 + 25?", {images}, max_tokens=3).token_ids))
print(sorted({HEAVY!r} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["3", "[]"]
