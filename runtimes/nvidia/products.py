"""NVIDIA's two products behind one code path, and the record of what differs between TensorRT and TensorRT for RTX."""

from __future__ import annotations

import functools
import re
from collections import deque
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from arriero.errors import ArrieroError, MachineLacks
from arriero.runtimes.broken_package import does_not_load
from arriero.runtimes.manifest import Manifest
from arriero.runtimes.nvidia.cuda import Device, load_cuda
from arriero.strict_json import read_json_object
from arriero.traits import install


@dataclass(frozen=True)
class Product:
    """TensorRT: its names, its versions, and how it is loaded and used."""

    backend: str = "tensorrt"
    title: str = "TensorRT"
    modules: tuple[str, ...] = ("tensorrt",)
    extra: str = "tensorrt"
    package: str = "tensorrt"  # as pip names it
    elsewhere: str = "; on a Jetson it comes with JetPack (`apt-get install python3-libnvinfer`)"
    # the least of each major: the first with IMoELayer and IKVCacheUpdateLayer
    versions: tuple[tuple[int, ...], ...] = ((10, 16), (11, 0))

    @property
    def releases(self) -> str:
        """The versions that it may have, for people."""
        return " or ".join(".".join(map(str, least)) for least in self.versions)

    def supports(self, version: str) -> bool:
        """Whether our networks and engines fit `version`."""
        numbers = release(version)
        return any(numbers[:1] == least[:1] and numbers >= least for least in self.versions)

    def load(self) -> Any:
        """The bindings' module. Raises MachineLacks with what to install."""
        failure: Exception | None = None
        for name in self.modules:
            try:
                self.prepare(name)
                return import_module(name)
            except ModuleNotFoundError as error:
                failure = failure or error
            except Exception as error:  # installed, but its own libraries are missing or do not load
                lack = does_not_load(name, error, self.extra)
                raise MachineLacks(lack.what, remedy=f"{lack.remedy}{self.elsewhere}") from error
        raise MachineLacks(
            f"{self.title} is not installed ({failure})",
            remedy=f"Install it with `{install(self.extra)}`{self.elsewhere}",
        )

    def prepare(self, module: str) -> None:
        """Load what `module` needs and cannot find by itself."""

    def configure(self, trt: Any, engine: Any, plan: Path) -> Any:
        """What all contexts of the engine from the file `plan` share; None for nothing."""
        return None

    def put_away(self, config: Any, plan: Path) -> None:
        """Keep what the next process can use of `configure`'s result."""

    def new_context(self, trt: Any, engine: Any, config: Any) -> Any:
        """An execution context that takes the GPU's memory for one profile only; None when TensorRT refuses."""
        return engine.create_execution_context(trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE)

    def capturable(self, context: Any, stream: int) -> bool:
        """Whether the next step on `stream` can be recorded as a CUDA graph."""
        return True


@functools.cache
def listen(trt: Any) -> Any:
    """A logger that keeps the last errors as `errors`, and as `layers` what a builder says it made of a graph.

    One for each product, for as long as the process runs: a product keeps the first logger that it gets, whatever comes
    later, and does not keep it alive.
    """

    class Listener(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind11 wants the base called by name
            self.errors: deque[str] = deque(maxlen=32)
            self.layers: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(" ".join(message.split()))
            elif message.startswith("Layers:"):
                self.layers.append(message)

    return Listener()


def check_product(manifest: Manifest, product: Product) -> None:
    """Refuse a bundle for another GPU, another version of `product`, or with engines of another build than it says.

    Nothing of the bundle is loaded before. Raises MachineLacks or ArrieroError with the remedy.
    """
    where = f"{manifest.bundle / 'manifest.json'}"
    built, gpu = manifest.tools.get(product.backend), manifest.target.gpu
    if built is None or gpu is None:
        raise ArrieroError(
            f"the manifest does not say which {product.title} and which GPU the engines were built for",
            where=f"{where}:{'tools' if built is None else 'target.gpu'}",
            remedy="Rebuild the bundle with `arriero build`",
        )
    check_plugins(manifest)
    installed = str(product.load().__version__)
    if release(installed) != release(built):
        needed = ".".join(map(str, release(built)))
        raise MachineLacks(
            f"the engines were built with {product.title} {needed} and {installed} is installed",
            where=f"{where}:tools.{product.backend}",
            remedy=f"Install `{product.package}=={needed}.*` with pip, or build the bundle with {installed}",
        )
    device = Device(load_cuda(product.extra))
    try:
        if device.arch != gpu:
            raise MachineLacks(
                f"the engines were built for {gpu} and this machine's GPU is {device.arch}",
                where=f"{where}:target.gpu",
                remedy=f"Build a target with `gpu: {device.arch}`, or `gpu: native` on this machine",
            )
    finally:
        device.close()


def check_plugins(manifest: Manifest) -> None:
    """Refuse engines with kernels other than the manifest's: `<part>.json` names those that each was compiled with."""
    recorded = manifest.target.plugins
    for part in sorted(name for name in manifest.files if name.endswith(".engine")):
        described = manifest.bundle / part.replace(".engine", ".json")
        try:
            inside = dict(read_json_object(described, "").get("plugins") or {})
        except (ArrieroError, AttributeError, TypeError, ValueError):
            continue  # whoever loads the engine says what is wrong with the file
        for name, digest in inside.items():
            if recorded.get(name) != digest:
                raise ArrieroError(
                    f"the engine holds the kernel {name} {digest[:12]}..",
                    where=f"{described}:plugins",
                    expected=f"{recorded[name][:12]}.., as the manifest says"
                    if name in recorded
                    else "none of that name",
                    remedy="The bundle mixes files of two builds: rebuild it with `arriero build`",
                )


def release(version: str) -> tuple[int, ...]:
    """The first three numbers of a version, those that an engine is tied to: 10.16.1.11 -> (10, 16, 1)."""
    match = re.match(r"\d+(\.\d+){0,2}", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()
