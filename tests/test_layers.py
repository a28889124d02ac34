"""The layers stay apart: who may import whom, read from the sources; and what a running bundle loads."""

from __future__ import annotations

import subprocess
import sys

import pytest

from arriero.export.pipeline.sources import imports
from docs.rooms import MAY_IMPORT, PICTURE, ROOMS, ROOT, draw, edges, sources

LAYERS = (*ROOMS, "models")
# What an edge device has: everything else would have to be installed there.
AT_RUN_TIME = {"numpy", "onnxruntime", "tvm_ffi", "cuda", "tokenizers", "jinja2", "PIL", "av", "pypdfium2", "rich"}
# each by an extra of its own
AT_RUN_TIME |= {"starlette", "uvicorn", "h11", "prometheus_client", "llguidance", "opentelemetry"}
HEAVY = {"torch", "onnx", "onnx_ir", "onnxscript", "transformers", "pydantic", "yaml", "safetensors", "typer", "rich"}
MAX_LINES = 500

SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.py"), *(file for layer in (*LAYERS, "tests") for file in (ROOT / layer).rglob("*.py")))
)


def test_every_layer_has_sources():
    assert {source.partition("/")[0] for source in SOURCES} >= {*LAYERS, "tests"}


@pytest.mark.parametrize("folder", LAYERS)
def test_a_layer_imports_only_what_it_may(folder):
    allowed = MAY_IMPORT[folder] | {folder, "errors", "sizes", "strict_json", "version", "traits", "thresholds"}
    for source in sources(folder):
        ours = {name.split(".")[1] for name in imports(source) if name.startswith("arriero.")}
        assert ours <= allowed, source


@pytest.mark.parametrize("folder", ROOMS)
def test_a_room_imports_no_room_above_it(folder):
    order = list(ROOMS[folder])
    upward = {
        f"{above} of {', '.join(sorted(files))}": room
        for (room, above), files in edges().items()
        if room[0] == above[0] == folder and order.index(above[1]) < order.index(room[1])
    }
    assert not upward


@pytest.mark.parametrize("folder", ROOMS)
def test_every_folder_and_named_file_is_a_room(folder):
    """A new folder that no room names would be taken for loose files."""
    named = {member for members in ROOMS[folder].values() for member in members} - {"*"}
    assert named <= {path.name for path in (ROOT / folder).iterdir()}
    assert {path.name for path in (ROOT / folder).iterdir() if path.is_dir() and any(path.glob("*.py"))} <= named


@pytest.mark.parametrize("source", sources("runtimes"))
def test_the_runtime_needs_little(source):
    modules = {name.partition(".")[0] for name in imports(source)}
    assert modules - {"arriero"} - set(sys.stdlib_module_names) <= AT_RUN_TIME


def test_only_models_imports_models():
    importers = {source for source in SOURCES if any(name.startswith("arriero.models") for name in imports(source))}
    assert {source.partition("/")[0] for source in importers} <= {"models", "tests"}


@pytest.mark.parametrize("source", SOURCES)
def test_nobody_imports_a_bare_layer(source):
    """`import export` would be a second copy of `arriero.export`."""
    assert not {name.partition(".")[0] for name in imports(source)} & set(LAYERS)


def test_the_picture_of_the_rooms_is_current():
    assert PICTURE.read_text(encoding="utf-8") == draw(), "draw it anew: python docs/rooms.py"


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
