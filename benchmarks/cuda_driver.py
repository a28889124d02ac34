"""The few functions of NVIDIA's driver that running a compiled kernel takes, by ctypes: no CUDA toolkit, no torch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from arriero.errors import MachineLacks
from arriero.export.compile.cuda.build_cuda_kernels import build_kernel
from arriero.export.compile.cuda.launch import SCALARS, THREADS, Kernel

MAJOR, MINOR = 75, 76  # attributes of a device: its compute capability


def open_driver() -> Any:
    """The driver's library. Raises MachineLacks without one."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise MachineLacks(
            f"there is no NVIDIA driver: {error}", remedy="Run this on a machine with an NVIDIA GPU and its driver"
        ) from None


class CudaGpu:
    """The first GPU. Memory that it hands out lives as long as the process."""

    def __init__(self, driver: Any) -> None:
        """Take the device's primary context, which torch uses as well."""
        self._driver = driver
        self._functions: dict[Kernel, ctypes.c_void_p] = {}
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        name = ctypes.create_string_buffer(100)
        self._call("cuDeviceGetName", name, 100, device)
        self.name = name.value.decode()
        capability = [ctypes.c_int(), ctypes.c_int()]
        for value, attribute in zip(capability, (MAJOR, MINOR), strict=True):
            self._call("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        self.architecture = f"sm_{capability[0].value}{capability[1].value}"
        version = ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(version))
        self.driver_version = f"{version.value // 1000}.{version.value % 1000 // 10}"

    def allocate(self, size: int) -> int:
        """The address of `size` new bytes."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return address.value

    def free(self, address: int) -> None:
        """Give memory back."""
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def upload(self, array: np.ndarray, address: int | None = None) -> int:
        """Copy an array to the device; gives its address."""
        address = self.allocate(array.nbytes) if address is None else address
        source = np.ascontiguousarray(array)
        data = ctypes.c_void_p(source.ctypes.data)
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), data, ctypes.c_size_t(source.nbytes))
        return address

    def download(self, address: int, array: np.ndarray) -> None:
        """Copy from the device into `array`."""
        data = ctypes.c_void_p(array.ctypes.data)
        self._call("cuMemcpyDtoH_v2", data, ctypes.c_uint64(address), ctypes.c_size_t(array.nbytes))

    def copy(self, to: int, source: int, size: int) -> None:
        """Copy within the device, without waiting for it."""
        self._call("cuMemcpyDtoDAsync_v2", ctypes.c_uint64(to), ctypes.c_uint64(source), ctypes.c_size_t(size), None)

    def start(self, kernel: Kernel, addresses: Sequence[int], sizes: dict[str, int], result: int) -> None:
        """Launch `kernel`, compiled for this GPU, without waiting for it."""
        values = [*map(ctypes.c_uint64, addresses), *(ctypes.c_int(sizes[name]) for name in SCALARS)]
        values.append(ctypes.c_uint64(result))
        arguments = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        x, y = kernel.grid(*(sizes[name] for name in SCALARS[:-1]))
        self._call("cuLaunchKernel", self._function(kernel), x, y, 1, THREADS, 1, 1, 0, None, arguments, None)

    def launch(self, kernel: Kernel, arrays: Sequence[np.ndarray], sizes: dict[str, int], result: np.ndarray) -> None:
        """Run `kernel` on arrays of the host, into `result`."""
        addresses = [self.upload(array) for array in [*arrays, result]]
        self.start(kernel, addresses[:-1], sizes, addresses[-1])
        self._call("cuCtxSynchronize")
        self.download(addresses[-1], result)
        for address in addresses:
            self.free(address)

    def seconds(self, run: Callable[[], None]) -> float:
        """Time what `run` starts, by the device's clock."""
        begin, end, passed = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_float()
        for event in (begin, end):
            self._call("cuEventCreate", ctypes.byref(event), 0)
        self._call("cuEventRecord", begin, None)
        run()
        self._call("cuEventRecord", end, None)
        self._call("cuEventSynchronize", end)
        self._call("cuEventElapsedTime", ctypes.byref(passed), begin, end)
        for event in (begin, end):
            self._call("cuEventDestroy_v2", event)
        return passed.value / 1000

    def _function(self, kernel: Kernel) -> ctypes.c_void_p:
        if kernel not in self._functions:
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            ptx = build_kernel(kernel, self.architecture).ptx.encode()
            self._call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(ptx))
            self._call("cuModuleGetFunction", ctypes.byref(function), module, ctypes.c_char_p(kernel.name.encode()))
            self._functions[kernel] = function
        return self._functions[kernel]

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._driver, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'unknown').decode()} ({code})")
