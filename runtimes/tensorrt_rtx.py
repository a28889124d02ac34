"""The backend `tensorrt-rtx`: the engines of TensorRT for RTX, which finishes its kernels on the user's own GPU."""

from __future__ import annotations

import ctypes
import hashlib
import os
import warnings
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from arriero.errors import ArrieroError
from arriero.runtimes.backend import BackendOptions, ModelSpec
from arriero.runtimes.manifest import Manifest
from arriero.runtimes.nvidia.products import Product, check_product
from arriero.runtimes.tensorrt import TensorRtBackend
from arriero.runtimes.user_cache import user_cache
from arriero.traits import reinstall

BINDINGS, LIBRARIES = "tensorrt_rtx_bindings", "onnxruntime_ep_nv_tensorrt_rtx"
HEAD = 1 << 20  # bytes of a plan that tell it from others
CHECKSUM_BYTES = hashlib.sha256().digest_size
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
    versions: tuple[tuple[int, ...], ...] = ((1, 7),)

    def load(self) -> Any:
        """The bindings' module. Raises MachineLacks with what to install, ArrieroError for a pair that does not fit."""
        module = super().load()
        bundled = [library.name.partition(".so.")[2] for library in _libraries() if module.__name__ == BINDINGS]
        if bundled and not f"{module.__version__}.".startswith(f"{bundled[0]}."):
            raise ArrieroError(
                f"the bindings are of version {module.__version__} and the libraries of {bundled[0]}",
                where=LIBRARIES,
                expected="the same version",
                remedy=f"Install the pair that fits: {reinstall(self.extra)}",
            )
        return module

    def prepare(self, module: str) -> None:
        """Load the libraries beside the bindings: these ask for them by their short names, which they carry inside."""
        for library in _libraries() if module == BINDINGS else ():
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)

    def configure(self, trt: Any, engine: Any, plan: Path) -> Any:
        """A configuration whose cache of kernels every context of the engine uses: each is compiled once.

        It begins with what `put_away` kept of an earlier process.
        """
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE)
        cache = config.create_runtime_cache()
        if (kept := _kept(plan)) is not None:
            with suppress(OSError), open(kept, "rb", opener=_no_link) as file:
                checksum, kernels = file.read(CHECKSUM_BYTES), file.read()
                if checksum != hashlib.sha256(kernels).digest():
                    _compiled_anew(kept, "they were changed or damaged")
                elif not cache.deserialize(kernels):
                    _compiled_anew(kept, "they are of another driver or GPU")
        config.set_runtime_cache(cache)
        # graphs are recorded by us, over copies and step together
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        return config

    def put_away(self, config: Any, plan: Path) -> None:
        """Keep the kernels that were compiled for this GPU, so that the next process need not wait for them."""
        serialized = config.get_runtime_cache().serialize() if config is not None else None
        place = _kept(plan)
        if serialized is None or place is None:
            return
        kernels = bytes(memoryview(serialized))
        content = hashlib.sha256(kernels).digest() + kernels
        with suppress(OSError):
            if place.read_bytes() == content:
                return
        with suppress(OSError):  # it is a cache: where nothing can be written, kernels are compiled each time
            place.parent.mkdir(parents=True, exist_ok=True)
            with NamedTemporaryFile(dir=place.parent, delete=False) as file:
                file.write(content)
            Path(file.name).replace(place)

    def new_context(self, trt: Any, engine: Any, config: Any) -> Any:
        """An execution context over the shared configuration; None when TensorRT refuses."""
        return engine.create_execution_context(config)

    def capturable(self, context: Any, stream: int) -> bool:
        """Whether all kernels of the next step are compiled, so that recording it meets nothing else."""
        return bool(context.is_stream_capturable(stream))


PRODUCT = RtxProduct()


def _libraries() -> list[Path]:
    """NVIDIA's libraries in the package that brings them for the bindings; none where it is not installed."""
    spec = find_spec(LIBRARIES)
    folders = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]
    return [library for folder in folders for pattern in FILES for library in sorted(folder.glob(pattern))]


def _compiled_anew(kept: Path, why: str) -> None:
    """Say why the first steps take longer than those of the last process did."""
    warnings.warn(f"the kernels in {kept} are compiled anew: {why}", RuntimeWarning, stacklevel=2)


def _no_link(path: str, flags: int) -> int:
    """Opens a file, not what a link in its place leads to: that is not what was kept."""
    return os.open(path, flags | os.O_NOFOLLOW)


def _kept(plan: Path) -> Path | None:
    """Where the kernels of a plan are kept, behind their sha256: in the user's cache folder, under the hash of the
    plan's beginning. None where the user wants nothing kept.
    """
    if (cache := user_cache()) is None:
        return None
    with plan.open("rb") as file:
        head = file.read(HEAD)
    name = hashlib.sha256(f"{plan.stat().st_size} ".encode() + head).hexdigest()[:32]
    return cache / f"{name}.rtx-kernels"


def open_backend(bundle: Path, spec: ModelSpec, options: BackendOptions) -> TensorRtBackend:
    """Load the engines in `bundle` for the model `spec`; the GPU has its own threads, so `options` changes nothing."""
    return TensorRtBackend(bundle, spec, PRODUCT)


def check_machine(manifest: Manifest) -> None:
    """Refuse a bundle whose engines this machine cannot load, before any is. Raises MachineLacks with the remedy."""
    check_product(manifest, PRODUCT)
