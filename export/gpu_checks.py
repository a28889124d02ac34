"""What this machine has and lacks for NVIDIA's two products: driver, GPU and its architecture, library and its version.

The driver is asked directly, so that it is told apart from the packages even where none of these is installed.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from arriero.errors import MachineLacks
from arriero.export.budget import human_bytes
from arriero.export.checks import BUILD, RUN, Check, status
from arriero.runtimes.backend import module_of
from arriero.runtimes.cuda import DRIVER
from arriero.runtimes.products import Product, release

# What each product makes engines for: TensorRT as its releases tell, TensorRT for RTX as its `ComputeCapability` lists.
SUPPORTED: dict[str, tuple[int, ...]] = {
    "tensorrt": (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121),
    "tensorrt-rtx": (75, 80, 86, 89, 120, 121),
}
# Least versions, one for each major that we use.
VERSIONS: dict[str, tuple[tuple[int, ...], ...]] = {"tensorrt": ((10, 16), (11, 0)), "tensorrt-rtx": ((1, 7),)}
# A driver names the newest CUDA that it runs; an older one of the same major runs it too.
OLDEST_CUDA = 12
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver shows it."""

    name: str
    capability: int
    memory: int

    def __str__(self) -> str:
        return f"{self.name}, sm_{self.capability}, {human_bytes(self.memory)}"


def gpu_checks(backend: str) -> tuple[Check, ...]:
    """The findings on driver, GPUs and library for one of the two backends."""
    # TensorRT measures kernels while it builds, so it needs the GPU for that too; RTX finishes engines where they run
    needed = (BUILD, RUN) if backend == "tensorrt" else (RUN,)
    return (*_driver(backend, needed), _library(backend))


def open_driver() -> Any | None:
    """NVIDIA's driver library, ready for questions; None where it is missing or has no GPU to answer for."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def _driver(backend: str, needed: tuple[str, ...]) -> tuple[Check, ...]:
    driver = open_driver()
    if driver is None:
        lacks = Check("NVIDIA driver", "missing", "no libcuda.so.1", needed, DRIVER)
        return (lacks, Check("GPU", "missing", "not known without a driver", needed, DRIVER))
    number = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(number))
    cuda = (number.value // 1000, number.value % 1000 // 10)
    ok = cuda[0] >= OLDEST_CUDA
    remedy = None if ok else f"Install a driver for CUDA {OLDEST_CUDA} or newer"
    told = Check("NVIDIA driver", status(ok), f"for CUDA {cuda[0]}.{cuda[1]} and older", needed, remedy)
    gpus = list_gpus(driver)
    fitting = [number for number, gpu in enumerate(gpus) if gpu.capability in SUPPORTED[backend]]
    listed = "; ".join(map(str, gpus)) or "none that this process may use"
    advice = None if gpus else DRIVER
    if fitting and fitting[0] > 0:
        advice = f"Set CUDA_VISIBLE_DEVICES={fitting[0]}: the first GPU is the one that is used"
    elif gpus and not fitting:
        others = [name for name, arches in SUPPORTED.items() if gpus[0].capability in arches]
        advice = f"Take the backend {others[0]} for it" if others else "It is too old for this product: use a newer GPU"
    return told, Check("GPU", status(advice is None), listed, needed, advice)


def list_gpus(driver: Any) -> list[Gpu]:
    """The GPUs that the driver shows this process."""
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    found = []
    for number in range(count.value):
        device, part, name, memory = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(96), ctypes.c_size_t()
        driver.cuDeviceGet(ctypes.byref(device), number)
        capability = 0
        for attribute in (MAJOR, MINOR):
            driver.cuDeviceGetAttribute(ctypes.byref(part), attribute, device)
            capability = 10 * capability + part.value
        driver.cuDeviceGetName(name, len(name), device)
        driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        found.append(Gpu(name.value.decode(errors="replace"), capability, memory.value))
    return found


def _library(backend: str) -> Check:
    """Load the product for real: bindings that are installed may still lack their library."""
    product: Product = import_module(f"arriero.runtimes.{module_of(backend)}").PRODUCT
    name, both = f"{product.title} loads", (BUILD, RUN)
    try:
        version = str(product.load().__version__)
    except MachineLacks as lack:
        return Check(name, "missing", lack.what, both, lack.remedy)
    except Exception as error:  # whatever a broken native library raises is the finding
        remedy = f"Reinstall it: pip install --force-reinstall 'arriero[{product.extra}]'"
        return Check(name, "missing", f"fails: {error}", both, remedy)
    least = VERSIONS[backend]
    if any(release(version)[0] == one[0] and release(version) >= one for one in least):
        return Check(name, "ok", version, both)
    wanted = " or ".join(".".join(map(str, one)) for one in least)
    advice = f"Install {product.title} {wanted}: pip install 'arriero[{product.extra}]'{product.elsewhere}"
    return Check(name, "missing", version, both, advice)
