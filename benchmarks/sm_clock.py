"""The clock that a GPU's multiprocessors run at, from the NVML library that comes with NVIDIA's driver."""

from __future__ import annotations

import ctypes
from typing import Any

SM = 1  # NVML's number of the multiprocessors' clock


def open_nvml() -> Any | None:
    """The library; None without it."""
    try:
        return ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None


class SmClock:
    """Reads the clock of the GPU at a PCI address, which is not numbered as CUDA numbers it."""

    def __init__(self, address: str) -> None:
        """`address` as the driver's `cuDeviceGetPCIBusId` gives it."""
        self._handle, self._library = ctypes.c_void_p(), open_nvml()
        if self._library is not None and (
            self._library.nvmlInit_v2()
            or self._library.nvmlDeviceGetHandleByPciBusId_v2(
                ctypes.c_char_p(address.encode()), ctypes.byref(self._handle)
            )
        ):
            self._library = None

    def read(self) -> int | None:
        """MHz now; None where NVML is missing or does not say."""
        value = ctypes.c_uint()
        if self._library is None or self._library.nvmlDeviceGetClockInfo(self._handle, SM, ctypes.byref(value)):
            return None
        return value.value
