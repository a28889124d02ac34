"""NVIDIA's two products behind one door: how each is loaded, and all that differs between them and their majors.

TensorRT for RTX comes from the registry as bindings and, within NVIDIA's plugin for ONNX Runtime, libraries; both are
under NVIDIA's own licence, so they are an optional extra and never part of this package. TensorRT is what is installed:
10.16 (JetPack 6) or 11.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from arriero.errors import MachineLacks
from arriero.export.compile.nvidia.gpus import Gpu, local_gpus
from arriero.runtimes import tensorrt, tensorrt_rtx
from arriero.traits import TRAITS, install

RTX, TENSORRT = "tensorrt-rtx", "tensorrt"
PRODUCTS = {RTX: tensorrt_rtx.PRODUCT, TENSORRT: tensorrt.PRODUCT}


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
    def description(self) -> str:
        """Product and version for people."""
        return f"{PRODUCTS[self.product].title} {self.version}"

    @property
    def network_flags(self) -> int:
        """Types in the network are types in the engine. (11 knows no other networks and ignores the flag.)"""
        return 1 << int(self.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)

    @property
    def keeps_timings(self) -> bool:
        """Whether a timing cache does anything: RTX chooses kernels on the device it runs on."""
        return not TRAITS[self.product].builds_anywhere

    def aim(self, config: Any, gpu: Gpu) -> None:
        """Let `config` build for `gpu`. RTX builds for any; TensorRT measures kernels, so the GPU has to be here."""
        if TRAITS[self.product].builds_anywhere:
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(self.module.ComputeCapability, f"SM{gpu.capability}"), 0)

    def check_here(self, gpu: Gpu) -> None:
        """Refuse to build for a GPU that this machine lacks, where the product cannot."""
        if not TRAITS[self.product].builds_anywhere and gpu not in local_gpus():
            raise MachineLacks(
                f"TensorRT builds an engine only on the kind of GPU that will run it, here {gpu.description}",
                expected="such a GPU in this machine",
                remedy="Run the same command on a machine that has one, or take the backend tensorrt-rtx",
            )


def load(product: str) -> Api:
    """The product of the backend `product`. Raises MachineLacks with the package that is missing or too old."""
    product_traits = PRODUCTS[product]
    module = product_traits.load()
    if not product_traits.supports(str(module.__version__)):
        raise MachineLacks(
            f"{product_traits.title} {module.__version__} is installed",
            expected=f"{product_traits.releases}, or newer of that major",
            remedy=f"Install one of these: {install(product_traits.extra)}{product_traits.elsewhere}",
        )
    return Api(product, module)
