"""The GPUs that a target may be compiled for: friendly names, or a compute capability as in `sm_89`."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from arriero.errors import ArrieroError, MachineLacks
from arriero.export.compile.nvidia.driver import list_cards, open_driver
from arriero.traits import TRAITS

NATIVE = "native"
NAMED: dict[str, int] = {
    "rtx-2080-ti": 75,
    "t4": 75,
    "a100": 80,
    "rtx-3090": 86,
    "a10": 86,
    "jetson-orin": 87,
    "rtx-4090": 89,
    "l4": 89,
    "l40s": 89,
    "h100": 90,
    "h200": 90,
    "b200": 100,
    "b300": 103,
    "jetson-thor": 110,
    "rtx-5090": 120,
    "rtx-pro-6000": 120,
    "dgx-spark": 121,
}


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU: its compute capability times ten."""

    capability: int

    def __str__(self) -> str:
        return f"sm_{self.capability}"

    @property
    def description(self) -> str:
        """The capability as NVIDIA writes it, and cards that have it."""
        cards = [name for name, capability in NAMED.items() if capability == self.capability]
        return f"compute capability {self.capability / 10} ({', '.join([str(self), *cards])})"


def parse_gpu(text: str) -> Gpu:
    """Read a friendly name or `sm_NN`; `native` is the GPU of this machine. Raises ArrieroError with what is known."""
    if text == NATIVE:
        return native()
    match = re.fullmatch(r"sm_(\d{2,3})", text)
    capability = int(match.group(1)) if match else NAMED.get(text)
    built_for = sorted({number for traits in TRAITS.values() for number in traits.gpus})
    if capability is None or capability not in built_for:
        known = ", ".join(f"sm_{number}" for number in built_for)
        raise ArrieroError(f"there is no GPU {text!r}", expected=f"one of {NATIVE}, {', '.join(NAMED)}, or of {known}")
    return Gpu(capability)


def check_product(backend: str, gpu: Gpu, where: str) -> None:
    """Refuse a GPU that the product behind `backend` has no engines for."""
    built_for = TRAITS[backend].gpus
    if gpu.capability not in built_for:
        other = next((traits.name for traits in TRAITS.values() if gpu.capability in traits.gpus), None)
        raise ArrieroError(
            f"the backend {backend} builds no engines for {gpu.description}",
            where=where,
            expected=f"one of {', '.join(f'sm_{number}' for number in built_for)}",
            remedy=f"Take the backend {other} for it" if other else None,
        )


def native() -> Gpu:
    """The first GPU of this machine. Raises MachineLacks without one."""
    gpus = local_gpus()
    if not gpus:
        raise MachineLacks(
            "this machine has no NVIDIA GPU to compile for, or no driver for it",
            expected="a GPU, or the name of one",
            remedy="Name the target's GPU in `gpu`, for example `gpu: rtx-4090` or `gpu: sm_89`",
        )
    return gpus[0]


@functools.cache
def local_gpus() -> tuple[Gpu, ...]:
    """The GPUs that NVIDIA's driver shows on this machine; none without a driver."""
    driver = open_driver()
    return () if driver is None else tuple(Gpu(card.capability) for card in list_cards(driver))
