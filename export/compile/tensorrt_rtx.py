"""Compiles for TensorRT for RTX, on any machine: its engines are finished by the GPU that first runs them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from arriero.export.compile import Device, Watch, no_watch
from arriero.export.compile import tensorrt as shared
from arriero.export.compile.nvidia.tensorrt_api import RTX, Api, load
from arriero.runtimes.manifest import Compiled


def compile_graphs(
    folder: Path, parts: Sequence[str], device: Device, watch: Watch = no_watch, *, api: Api | None = None
) -> Compiled:
    """Compile as `tensorrt.compile_graphs` does; no GPU is needed."""
    return shared.compile_graphs(folder, parts, device, watch, api=api or load(RTX))
