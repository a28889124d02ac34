"""What NVIDIA's driver says of this machine's GPUs; asked directly, so that no package of NVIDIA's is needed for it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
NAME_BYTES = 96


@dataclass(frozen=True)
class Card:
    """One GPU: its name, its compute capability times ten, its memory in bytes."""

    name: str
    capability: int
    memory: int


def open_driver() -> Any | None:
    """NVIDIA's driver library, ready for questions; None where there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def list_cards(driver: Any) -> tuple[Card, ...]:
    """The GPUs that the driver shows this process, in CUDA's order."""
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    return tuple(_card(driver, number) for number in range(count.value))


def _card(driver: Any, number: int) -> Card:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name, memory = ctypes.create_string_buffer(NAME_BYTES), ctypes.c_size_t()
    driver.cuDeviceGet(ctypes.byref(device), number)
    driver.cuDeviceGetAttribute(ctypes.byref(major), MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), MINOR, device)
    driver.cuDeviceGetName(name, NAME_BYTES, device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    return Card(name.value.decode(errors="replace"), 10 * major.value + minor.value, memory.value)
