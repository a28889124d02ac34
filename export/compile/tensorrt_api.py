"""NVIDIA's two products behind one door: how each is loaded, and all that differs between them and their majors.

TensorRT for RTX comes from the registry as bindings and, within NVIDIA's plugin for ONNX Runtime, libraries; both are
under NVIDIA's own licence, so they are an optional extra and never part of this package. TensorRT is what is installed:
10.16 (JetPack 6) or 11.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from arriero.errors import ArrieroError, MachineLacks
from arriero.export.compile.gpus import Gpu, local_gpus

RTX, TENSORRT = "tensorrt-rtx", "tensorrt"
TOLD = {RTX: "TensorRT for RTX", TENSORRT: "TensorRT"}
# Importable modules of NVIDIA's own full packages, and of the registry's bindings without libraries.
RTX_MODULES, RTX_BINDINGS, RTX_LIBRARIES = "tensorrt_rtx", "tensorrt_rtx_bindings", "onnxruntime_ep_nv_tensorrt_rtx"
RTX_FILES = ("libtensorrt_rtx.so.*", "libtensorrt_onnxparser_rtx.so.*")  # the parser needs the first
MAJORS = {10: (10, 16), 11: (11, 0)}  # major -> the least version of it: IMoELayer and IKVCacheUpdateLayer


@dataclass(frozen=True)
class Api:
    """One product: its Python module (or a recorder in its place), and what of it goes by product and major."""

    product: str
    module: Any

    @property
    def version(self) -> str:
        """The product's version."""
        return str(self.module.__version__)

    @property
    def told(self) -> str:
        """Product and version for people."""
        return f"{TOLD[self.product]} {self.version}"

    @property
    def network_flags(self) -> int:
        """Types in the network are types in the engine. (11 knows no other networks and ignores the flag.)"""
        return 1 << int(self.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)

    @property
    def keeps_timings(self) -> bool:
        """Whether a timing cache does anything: RTX chooses kernels on the device it runs on."""
        return self.product == TENSORRT

    def aim(self, config: Any, gpu: Gpu) -> None:
        """Let `config` build for `gpu`. RTX builds for any; TensorRT measures kernels, so the GPU has to be here."""
        if self.product == RTX:
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(self.module.ComputeCapability, f"SM{gpu.capability}"), 0)

    def check_here(self, gpu: Gpu) -> None:
        """Refuse to build for a GPU that this machine lacks, where the product cannot."""
        if self.product == TENSORRT and gpu not in local_gpus():
            raise MachineLacks(
                f"TensorRT builds an engine only on the kind of GPU that will run it, here {gpu.told}",
                expected="such a GPU in this machine",
                remedy="Run the same command on a machine that has one, or take the backend tensorrt-rtx",
            )


@functools.cache
def load(product: str) -> Api:
    """The product of the backend `product`. Raises MachineLacks with the package that is missing."""
    if product == RTX:
        return Api(RTX, _load_rtx())
    if find_spec(TENSORRT) is None:
        raise MachineLacks(
            "TensorRT is not installed",
            expected="TensorRT 10.16 or newer of major 10, or 11",
            remedy="Install it with `pip install 'arriero[tensorrt]'`; on a Jetson it comes with JetPack",
        )
    module = import_module(TENSORRT)
    check_version(str(module.__version__))
    return Api(TENSORRT, module)


def check_version(version: str) -> None:
    """Refuse a TensorRT that our networks do not fit."""
    numbers = tuple(int(part) for part in version.split(".")[:2])
    if numbers[0] not in MAJORS or numbers < MAJORS[numbers[0]]:
        raise MachineLacks(
            f"TensorRT {version} is installed",
            expected="10.16 or newer of major 10, or 11",
            remedy="Install one of these; JetPack 6 takes 10.16",
        )


def _load_rtx() -> Any:
    if find_spec(RTX_MODULES) is not None:  # NVIDIA's own package with libraries
        return import_module(RTX_MODULES)
    missing = [name for name in (RTX_BINDINGS, RTX_LIBRARIES) if find_spec(name) is None]
    if missing:
        raise MachineLacks(
            f"TensorRT for RTX is not installed (no {' and no '.join(missing)})",
            remedy="Install it with `pip install 'arriero[tensorrt-rtx]'`; NVIDIA's licence goes with it",
        )
    folder = _folder(RTX_LIBRARIES)
    # The bindings ask for the libraries by their short names, which those carry inside: once loaded, they are found.
    libraries = [next(iter(sorted(folder.glob(pattern))), folder / pattern) for pattern in RTX_FILES]
    try:
        for library in libraries:
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        module = import_module(RTX_BINDINGS)
    except (OSError, ImportError) as error:
        raise MachineLacks(
            f"TensorRT for RTX does not load ({error})",
            where=str(folder),
            remedy="Reinstall it: pip install --force-reinstall 'arriero[tensorrt-rtx]'",
        ) from error
    bundled = libraries[0].name.partition(".so.")[2]
    if not f"{module.__version__}.".startswith(f"{bundled}."):
        raise ArrieroError(
            f"the bindings are of version {module.__version__} and the libraries of {bundled}",
            where=str(folder),
            expected="the same version",
            remedy="Install the pair that fits: pip install --force-reinstall 'arriero[tensorrt-rtx]'",
        )
    return module


def _folder(package: str) -> Path:
    spec = find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations)))
