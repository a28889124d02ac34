"""What this machine has and lacks for NVIDIA's two products: driver, GPU and its architecture, library and its version.

The driver is told apart from the packages even where none of these is installed.
"""

from __future__ import annotations

import ctypes
from importlib import import_module

from arriero.errors import MachineLacks
from arriero.export.compile.nvidia.driver import Card, list_cards, open_driver
from arriero.export.machine.checks import Check, status
from arriero.runtimes.nvidia.cuda import DRIVER
from arriero.runtimes.nvidia.products import Product
from arriero.sizes import human_bytes
from arriero.traits import BUILD, RUN, TRAITS, install

# A driver names the newest CUDA that it runs; an older one of the same major runs it too.
OLDEST_CUDA = 12


def gpu_checks(backend: str) -> tuple[Check, ...]:
    """The findings on driver, GPUs and library for one of the two backends."""
    # TensorRT measures kernels while it builds, so it needs the GPU for that too; RTX finishes engines where they run
    needed = (RUN,) if TRAITS[backend].builds_anywhere else (BUILD, RUN)
    return (*_driver(backend, needed), _library(backend))


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
    driver_check = Check("NVIDIA driver", status(ok), f"for CUDA {cuda[0]}.{cuda[1]} and older", needed, remedy)
    cards = list_cards(driver)
    fitting = [number for number, card in enumerate(cards) if card.capability in TRAITS[backend].gpus]
    listed = "; ".join(map(_describe_card, cards)) or "none that this process may use"
    advice = None if cards else DRIVER
    if fitting and fitting[0] > 0:
        advice = f"Set CUDA_VISIBLE_DEVICES={fitting[0]}: the first GPU is the one that is used"
    elif cards and not fitting:
        others = [name for name, traits in TRAITS.items() if cards[0].capability in traits.gpus]
        advice = f"Take the backend {others[0]} for it" if others else "It is too old for this product: use a newer GPU"
    return driver_check, Check("GPU", status(advice is None), listed, needed, advice)


def _describe_card(card: Card) -> str:
    return f"{card.name}, sm_{card.capability}, {human_bytes(card.memory)}"


def _library(backend: str) -> Check:
    """Load the product for real: bindings that are installed may still lack their library."""
    product: Product = import_module(f"arriero.runtimes.{TRAITS[backend].module}").PRODUCT
    name, both = f"{product.title} loads", (BUILD, RUN)
    try:
        version = str(product.load().__version__)
    except MachineLacks as lack:
        return Check(name, "missing", lack.what, both, lack.remedy)
    if product.supports(version):
        return Check(name, "ok", version, both)
    advice = f"Install {product.title} {product.releases}: {install(product.extra)}{product.elsewhere}"
    return Check(name, "missing", version, both, advice)
