"""What a target is compiled for: a processor, a GPU, or neither."""

from __future__ import annotations

from arriero.export.build_file.schema import Target
from arriero.export.compile.cpus import NATIVE, parse_cpu
from arriero.export.compile.nvidia.gpus import Gpu, parse_gpu
from arriero.traits import TRAITS


def kernel_arch(target: Target) -> str | None:
    """The architecture that the target's kernels are compiled for; None for a backend that brings its own."""
    return parse_cpu(target.cpu or NATIVE).arch if TRAITS[target.backend].compiles_for == "cpu" else None


def target_gpu(target: Target) -> Gpu | None:
    """The GPU that the target is compiled for; None for a backend on processors."""
    return parse_gpu(target.gpu or NATIVE) if TRAITS[target.backend].compiles_for == "gpu" else None


def device_of(target: Target) -> str:
    """The architecture of GPUs or processors that the target is compiled for; "any" where it is for none."""
    return str(target_gpu(target) or kernel_arch(target) or "any")
