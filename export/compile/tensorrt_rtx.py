"""Compiles for TensorRT for RTX, on any machine: its engines are finished by the GPU that first runs them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from arriero.export.compile import MemoryBudget, Watch
from arriero.export.compile import tensorrt as shared
from arriero.export.compile.nvidia.engine_shapes import Limits
from arriero.export.compile.nvidia.gpus import Gpu
from arriero.export.compile.nvidia.tensorrt_api import RTX, Api, load
from arriero.runtimes.manifest import Compiled


def compile_graphs(
    folder: Path,
    parts: Sequence[str],
    gpu: Gpu,
    limits: Limits,
    watch: Watch | None = None,
    *,
    room: MemoryBudget | None = None,
    api: Api | None = None,
) -> Compiled:
    """Compile as `tensorrt.compile_graphs` does; no GPU is needed."""
    return shared.compile_graphs(folder, parts, gpu, limits, watch, room=room, api=api or load(RTX))
