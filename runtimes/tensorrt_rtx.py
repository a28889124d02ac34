"""The backend `tensorrt-rtx`: the engines of TensorRT for RTX, which finishes its kernels on the user's own GPU."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from arriero.runtimes.backend import ModelSpec
from arriero.runtimes.manifest import Manifest
from arriero.runtimes.products import Product, check_product
from arriero.runtimes.tensorrt import TensorRtBackend

BINDINGS, LIBRARIES = "tensorrt_rtx_bindings", "onnxruntime_ep_nv_tensorrt_rtx"
FILES = ("libtensorrt_rtx.so.*", "libtensorrt_onnxparser_rtx.so.*")  # the parser needs the first


@dataclass(frozen=True)
class RtxProduct(Product):
    """TensorRT for RTX: contexts of an engine share the kernels that were compiled for this GPU."""

    backend: str = "tensorrt-rtx"
    title: str = "TensorRT for RTX"
    # the first comes with NVIDIA's own package, libraries included
    modules: tuple[str, ...] = ("tensorrt_rtx", BINDINGS)
    extra: str = "tensorrt-rtx"
    package: str = "tensorrt_rtx"
    elsewhere: str = ""

    def prepare(self, module: str) -> None:
        """Load the libraries beside the bindings: these ask for them by their short names, which they carry inside."""
        spec = find_spec(LIBRARIES) if module == BINDINGS else None
        for folder in spec.submodule_search_locations or () if spec is not None else ():
            for pattern in FILES:
                for library in sorted(Path(folder).glob(pattern)):
                    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)

    def configure(self, trt: Any, engine: Any) -> Any:
        """A configuration whose cache of kernels every context of the engine uses: each is compiled once."""
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE)
        config.set_runtime_cache(config.create_runtime_cache())
        # graphs are recorded by us, over copies and step together
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        return config

    def new_context(self, trt: Any, engine: Any, config: Any) -> Any:
        """An execution context over the shared configuration; None when TensorRT refuses."""
        return engine.create_execution_context(config)

    def capturable(self, context: Any, stream: int) -> bool:
        """Whether all kernels of the next step are compiled, so that recording it meets nothing else."""
        return bool(context.is_stream_capturable(stream))


PRODUCT = RtxProduct()


def open_backend(bundle: Path, spec: ModelSpec, threads: int | None = None) -> TensorRtBackend:
    """Load the engines in `bundle` for the model `spec`; the GPU has its own threads, so `threads` says nothing."""
    return TensorRtBackend(bundle, spec, PRODUCT)


def check_machine(manifest: Manifest) -> None:
    """Refuse a bundle whose engines this machine cannot load, before any is. Raises MachineLacks with the remedy."""
    check_product(manifest, PRODUCT)
