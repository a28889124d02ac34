"""The backend `tensorrt-rtx`: the engines of TensorRT for RTX, which finishes its kernels on the user's own GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arriero.runtimes.backend import ModelSpec
from arriero.runtimes.manifest import Manifest
from arriero.runtimes.products import Product, check_product
from arriero.runtimes.tensorrt import TensorRtBackend


@dataclass(frozen=True)
class RtxProduct(Product):
    """TensorRT for RTX: contexts of an engine share the kernels that were compiled for this GPU."""

    backend: str = "tensorrt-rtx"
    title: str = "TensorRT for RTX"
    # the first of these names comes with NVIDIA's own package, the second with its bindings alone
    modules: tuple[str, ...] = ("tensorrt_rtx", "tensorrt_rtx_bindings")
    extra: str = "tensorrt-rtx"
    package: str = "tensorrt_rtx"
    elsewhere: str = ""

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
