"""One record per backend: everything that the rest of the package needs to know of it.

A backend is a module of one name in `graphs.lower`, in `export.compile` and in `runtimes`, and its record here. What
tells backends apart is asked of the record, never of the name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

BUILD, RUN = "build", "run"

# Tokens of a prompt that are read at once. Activations grow with the piece and weights are read once per piece; at 512
# the matrix products already saturate. Engines and tiles of experts are dimensioned for it.
PREFILL_PIECE = 512
MOST_DRAFTED = 15  # tokens of an answer that may be guessed at a time, to be checked in one step
MOST_THREADS = 1024  # of a session: the time that pools of tens of thousands take to start is never over
SHARD = 4 << 30  # most bytes of one file of a bundle's weights, where its target names no other number


@dataclass(frozen=True)
class Package:
    """A distribution: the lowest version that works, what it is needed for, and which of our extras brings it."""

    name: str
    least: str
    needed_for: tuple[str, ...] = (BUILD, RUN)
    extra: str | None = None
    imports: tuple[str, ...] = ()  # the modules that code of ours imports of it
    instead: str | None = None  # a distribution that may stand in its place


@dataclass(frozen=True)
class Footprint:
    """Bytes that a backend takes beside weights and cache, as `benchmarks/plan_accuracy.py` measures them.

    Of memory, but for `code`.
    """

    compiler: int = 0  # the first time; half of it later
    runtime: int = 0
    layer: int = 0  # and for each layer of what is loaded
    stays: int = 0  # in the process once it was used, of its packages and of what it keeps for its next use
    computes_in: float = 0.0  # how much of `step_bytes`, logits aside, a step really takes
    keeps_steps: bool = False  # what steps computed in, for steps of the same size: see `StepMemory`
    code: int = 0  # on disk, of each part that is compiled
    maps_weights: bool = False  # read where the file is mapped; else each is copied, a quantised one packed besides


@dataclass(frozen=True)
class BackendTraits:
    """What one backend computes, on what, and what it needs."""

    name: str  # as build files and manifests have it
    compiles_for: Literal["any", "cpu", "gpu"]  # "any": its bundles run on every processor
    schemes: tuple[str, ...]  # kinds of a profile's schemes that it has kernels for
    cache_types: tuple[str, ...]  # what `kv_cache` may ask for; a GPU's cache is what the profile computes in
    head_multiple: int  # its attention takes heads of a multiple of so many features
    packages: tuple[Package, ...]
    files: tuple[str, ...]  # suffixes of what each graph of a bundle becomes
    footprint: Footprint = Footprint()
    gpus: tuple[int, ...] = ()  # compute capabilities times ten that it builds engines for
    most_elements: int | None = None  # of one tensor, where there is a limit
    builds_anywhere: bool = True  # else only on the GPU that will run the engines
    switches_adapters: bool = False  # a bundle may answer with one LoRA adapter or another
    forces_routing: bool = False  # its graphs take expert ids in the place of their routers' choice
    no_cap: str | None = None  # why it cannot keep to a cap on memory; None where it can
    keeps_stored_dtype: bool = False  # it reads exact matrices in the checkpoint's own dtype
    takes_half_scales: bool = False  # it reads scales of integers that are stored in float16

    @property
    def module(self) -> str:
        """The backend's module within each of the packages that has one."""
        return self.name.replace("-", "_")

    @property
    def is_onnx(self) -> bool:
        """Whether its bundles are ONNX files, for other tools too: `onnx.checker` refuses hard-linked weights."""
        return ".onnx" in self.files


TENSORRT_ELEMENTS = 2**31 - 1  # "The volume of a tensor cannot exceed 2^31-1", it says
CUDA_BINDINGS = ("cuda-bindings", "12.9", (RUN,))
TRAITS: dict[str, BackendTraits] = {
    traits.name: traits
    for traits in (
        BackendTraits(
            name="onnxruntime",
            compiles_for="any",
            # its CPU kernels for 16-bit floats are casts around float32 ones, where there are any
            schemes=("exact", "int_block", "fp8", "int8_dynamic", "int8_static"),
            cache_types=("float32", "int8"),
            head_multiple=8,
            packages=(Package("onnxruntime", "1.32", extra="onnxruntime", imports=("onnxruntime",)),),
            files=(".onnx",),
            footprint=Footprint(compiler=30 << 20, runtime=30 << 20, stays=10 << 20, computes_in=1.15),
            switches_adapters=True,
            forces_routing=True,
            no_cap="it copies every weight into memory of its own",
        ),
        BackendTraits(
            name="tvm",
            compiles_for="cpu",
            # fp8 is how weights are stored; activations stay float32, whatever the profile asks
            schemes=("exact", "int_block", "fp8"),
            cache_types=("float32", "float16", "int8"),
            head_multiple=16,
            packages=(
                Package("apache-tvm", "0.27", extra="tvm", imports=("tvm",)),
                Package("apache-tvm-ffi", "0.1.14", extra="tvm", imports=("tvm_ffi",)),
            ),
            files=(".so", ".json"),
            footprint=Footprint(
                compiler=70 << 20,
                runtime=40 << 20,
                layer=1_600_000,
                stays=80 << 20,
                computes_in=0.55,
                keeps_steps=True,
                code=1536 << 10,
                maps_weights=True,
            ),
            switches_adapters=True,
            forces_routing=True,
            keeps_stored_dtype=True,
            takes_half_scales=True,
        ),
        BackendTraits(
            name="tensorrt",
            compiles_for="gpu",
            schemes=("exact", "half", "int_block", "fp8_static", "int8_static"),
            cache_types=("float32",),
            head_multiple=1,
            packages=(
                Package("tensorrt", "10.16", extra="tensorrt", imports=("tensorrt",)),
                Package(*CUDA_BINDINGS, extra="tensorrt", imports=("cuda",)),
            ),
            files=(".engine", ".json"),
            # as TensorRT's releases list them
            gpus=(75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121),
            most_elements=TENSORRT_ELEMENTS,
            builds_anywhere=False,
            no_cap="its engines hold their weights in the GPU's memory",
        ),
        BackendTraits(
            name="tensorrt-rtx",
            compiles_for="gpu",
            schemes=("exact", "half", "int_block", "fp8_static", "int8_static"),
            cache_types=("float32",),
            head_multiple=1,
            # NVIDIA's own package brings bindings and libraries together, in the place of the registry's two
            packages=(
                Package(
                    *("tensorrt_rtx_cu13_bindings", "1.7.1"),
                    extra="tensorrt-rtx",
                    imports=("tensorrt_rtx",),
                    instead="tensorrt_rtx",
                ),
                Package("onnxruntime-ep-nv-tensorrt-rtx-cu13", "0.5", extra="tensorrt-rtx", instead="tensorrt_rtx"),
                Package(*CUDA_BINDINGS, extra="tensorrt-rtx"),
            ),
            files=(".engine", ".json"),
            # as its `ComputeCapability` lists them
            gpus=(75, 80, 86, 89, 120, 121),
            most_elements=TENSORRT_ELEMENTS,
            no_cap="its engines hold their weights in the GPU's memory",
        ),
    )
}
BACKENDS = tuple(TRAITS)

# What every build and every bundle needs, whatever the backend.
SHARED_PACKAGES = (
    Package("numpy", "2", imports=("numpy",)),
    Package("tokenizers", "0.21", imports=("tokenizers",)),
    Package("jinja2", "3.1", imports=("jinja2",)),
    Package("pillow", "11.3", imports=("PIL",)),
    Package("torch", "2.13", (BUILD,), "export"),
    Package("onnx", "1.23", (BUILD,), "export"),
    Package("onnx-ir", "1.1", (BUILD,), "export"),
    Package("onnxscript", "0.7.2", (BUILD,), "export"),
    Package("numba", "0.65", (BUILD,), "export"),
    Package("av", "14", (), "video", imports=("av",)),
)
# What the command is shown with.
COMMAND_PACKAGES = (Package("rich", "14", imports=("rich",)), Package("typer", "0.16", imports=("typer",)))


def install(extra: str | None) -> str:
    """The command that installs what `extra` brings, or with None what we need in any case, where we are installed."""
    return "pip install 'arriero'" if extra is None else f"pip install 'arriero[{extra}]'"


def reinstall(extra: str) -> str:
    """The command that installs anew what `extra` brings, in the versions that we ask for.

    It does not name us: `--force-reinstall` would ask a registry for us too, and none has us.
    """
    import importlib.metadata

    try:
        asked = importlib.metadata.requires("arriero") or []
    except importlib.metadata.PackageNotFoundError:
        asked = []
    brought = [one.partition(";")[0].strip() for one in asked if re.search(rf"extra == ['\"]{extra}['\"]", one)]
    packages = (package for traits in TRAITS.values() for package in traits.packages)
    named = brought or [package.name for package in packages if package.extra == extra]
    return " ".join(["pip install --force-reinstall", *(f"'{name}'" for name in named)])


def reinstall_package(module: str) -> tuple[str, str]:
    """The distribution that brings a module of somebody else's, and the command that installs it anew."""
    package = _package_of(module)
    if package is None or package.extra is None:
        name = module if package is None else package.name
        return name, f"pip install --force-reinstall '{name}'"
    return package.name, reinstall(package.extra)


def extra_of(module: str) -> str | None:
    """The extra that brings a module of somebody else's, None for none; what no device needs is for building."""
    package = _package_of(module)
    return "export" if package is None else package.extra


def _package_of(module: str) -> Package | None:
    backends = (package for traits in TRAITS.values() for package in traits.packages)
    packages = (*backends, *SHARED_PACKAGES, *COMMAND_PACKAGES)
    return next((package for package in packages if module in package.imports), None)
