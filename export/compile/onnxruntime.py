"""Compiles for ONNX Runtime: nothing is generated, the lowered graphs are proven to load with every kernel found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from arriero.errors import ArrieroError
from arriero.export.compile import Device, Watch, no_watch
from arriero.runtimes.load_onnxruntime import load_onnxruntime
from arriero.runtimes.manifest import Compiled
from arriero.runtimes.onnxruntime import session_options


def compile_graphs(folder: Path, parts: Sequence[str], device: Device, watch: Watch = no_watch) -> Compiled:
    """Load `<part>.onnx` of each of `parts` in `folder` as the runtime does; the device plays no part.

    Raises ArrieroError naming the graph that ONNX Runtime refuses, with its reason.
    """
    onnxruntime = load_onnxruntime()
    for number, part in enumerate(parts):
        watch("load", number, len(parts), "graphs")
        path = folder / f"{part}.onnx"
        try:
            onnxruntime.InferenceSession(path, session_options(1), providers=["CPUExecutionProvider"])
        except Exception as error:  # its exception types share no public base
            raise ArrieroError(
                f"ONNX Runtime {onnxruntime.__version__} does not load the graph ({error})",
                where=str(path),
                remedy="Build again; if it stays so, report it together with this sentence",
            ) from error
    watch("load", len(parts), len(parts), "graphs")
    return Compiled({"onnxruntime": onnxruntime.__version__})
