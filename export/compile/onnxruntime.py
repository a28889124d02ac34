"""Compiles for ONNX Runtime: nothing is generated, the lowered graphs are proven to load with every kernel found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnxruntime

from arriero.errors import ArrieroError
from arriero.export.compile import Device, Watch, no_watch
from arriero.runtimes.manifest import Compiled


def compile_graphs(folder: Path, parts: Sequence[str], device: Device, watch: Watch = no_watch) -> Compiled:
    """Load `<part>.onnx` of each of `parts` in `folder` with all optimisations; the device plays no part.

    Raises ArrieroError naming the graph that ONNX Runtime refuses, with its reason.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    for number, part in enumerate(parts):
        watch("load", number, len(parts), "graphs")
        path = folder / f"{part}.onnx"
        try:
            onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exception types share no public base
            raise ArrieroError(
                f"ONNX Runtime {onnxruntime.__version__} does not load the graph ({error})",
                where=str(path),
                remedy="Build again; if it stays so, report it together with this sentence",
            ) from error
    return Compiled({"onnxruntime": onnxruntime.__version__})
