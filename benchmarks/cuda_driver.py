"""The few functions of NVIDIA's driver that running and timing a kernel takes, by ctypes: no CUDA toolkit, no torch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import checkout  # noqa: F401
import numpy as np
from sm_clock import SmClock

from arriero.errors import MachineLacks
from arriero.export.compile.cuda.launch import SCALARS, Kernel

MAJOR, MINOR, MULTIPROCESSORS = 75, 76, 16  # attributes of a device
HELD = 1 << 30  # bytes copied ahead of what is timed, so that the host has queued all of it before it starts


def open_driver() -> Any:
    """The driver's library. Raises MachineLacks without one."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise MachineLacks(
            f"there is no NVIDIA driver: {error}", remedy="Run this on a machine with an NVIDIA GPU and its driver"
        ) from None


class Launch:
    """A kernel, its grid and its arguments, prepared once."""

    def __init__(self, function: ctypes.c_void_p, grid: tuple[int, int], threads: int, values: Sequence[Any]) -> None:
        """`values` are ctypes numbers in the kernel's order."""
        self._values = values  # the pointers below need them
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        self.arguments = (function, *grid, 1, threads, 1, 1, 0)
        self.pointers = pointers


class CudaGpu:
    """The first GPU, and one stream on it. Memory that it hands out lives as long as the process."""

    def __init__(self, driver: Any, code_for: Callable[[str], bytes]) -> None:
        """Take the device's primary context, which torch uses as well; `code_for` gives the kernels for "sm_89"."""
        self._driver, self._code_for = driver, code_for
        self._module: ctypes.c_void_p | None = None
        self._held: tuple[int, int] | None = None
        device, context, self._stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        self._call("cuStreamCreate", ctypes.byref(self._stream), 0)
        name = ctypes.create_string_buffer(100)
        self._call("cuDeviceGetName", name, 100, device)
        self.name = name.value.decode()
        numbers = {attribute: ctypes.c_int() for attribute in (MAJOR, MINOR, MULTIPROCESSORS)}
        for attribute, value in numbers.items():
            self._call("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        self.architecture = f"sm_{numbers[MAJOR].value}{numbers[MINOR].value}"
        self.multiprocessors = numbers[MULTIPROCESSORS].value
        version = ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(version))
        self.driver_version = f"{version.value // 1000}.{version.value % 1000 // 10}"
        address = ctypes.create_string_buffer(20)
        self._call("cuDeviceGetPCIBusId", address, 20, device)
        self.clock = SmClock(address.value.decode())

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
        """Copy from the device into `array`, after all that was started."""
        data = ctypes.c_void_p(array.ctypes.data)
        self._call("cuCtxSynchronize")
        self._call("cuMemcpyDtoH_v2", data, ctypes.c_uint64(address), ctypes.c_size_t(array.nbytes))

    def prepare(self, name: str, grid: tuple[int, int], threads: int, values: Sequence[Any]) -> Launch:
        """A launch of the entry `name`."""
        if self._module is None:
            self._module = ctypes.c_void_p()
            code = ctypes.c_char_p(self._code_for(self.architecture))
            self._call("cuModuleLoadData", ctypes.byref(self._module), code)
        function = ctypes.c_void_p()
        self._call("cuModuleGetFunction", ctypes.byref(function), self._module, ctypes.c_char_p(name.encode()))
        return Launch(function, grid, threads, values)

    def prepare_kernel(self, kernel: Kernel, addresses: Sequence[int], sizes: dict[str, int], result: int) -> Launch:
        """A launch of `kernel` on arrays of the device."""
        values = [*map(ctypes.c_uint64, addresses), *(ctypes.c_int(sizes[name]) for name in SCALARS)]
        grid = kernel.grid(*(sizes[name] for name in SCALARS[:-1]))
        return self.prepare(kernel.name, grid, kernel.threads, [*values, ctypes.c_uint64(result)])

    def start(self, launch: Launch) -> None:
        """Launch without waiting for it."""
        self._call("cuLaunchKernel", *launch.arguments, self._stream, launch.pointers, None)

    def run(self, kernel: Kernel, arrays: Sequence[np.ndarray], sizes: dict[str, int], result: np.ndarray) -> None:
        """Run `kernel` on arrays of the host, into `result`, whose values the kernel finds there."""
        addresses = [self.upload(array) for array in [*arrays, result]]
        self.start(self.prepare_kernel(kernel, addresses[:-1], sizes, addresses[-1]))
        self.download(addresses[-1], result)
        for address in addresses:
            self.free(address)

    def graph(self, launches: Sequence[Launch]) -> ctypes.c_void_p:
        """`launches` of one kernel, one after the other, as one graph, to be replayed."""
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self.start(launches[0])  # a driver may load a kernel at its first launch, which no capture bears
        self._call("cuStreamBeginCapture_v2", self._stream, 0)
        for launch in launches:
            self.start(launch)
        self._call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        self._call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_uint64(0))
        self._call("cuGraphDestroy", graph)
        return executable

    def replay(self, graph: ctypes.c_void_p) -> None:
        """Start a graph without waiting for it."""
        self._call("cuGraphLaunch", graph, self._stream)

    def drop(self, graph: ctypes.c_void_p) -> None:
        """Give a graph back."""
        self._call("cuGraphExecDestroy", graph)

    def time(self, graph: ctypes.c_void_p, times: int) -> tuple[float, int | None]:
        """Seconds of a replay by the device's clock, of `times` in a row, and the SM clock in MHz meanwhile.

        A copy runs ahead, so that all of them are queued when the first one starts; it also empties the cache.
        """
        if self._held is None:
            self._held = self.allocate(HELD), self.allocate(HELD)
        begin, end, passed = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_float()
        for event in (begin, end):
            self._call("cuEventCreate", ctypes.byref(event), 0)
        addresses = map(ctypes.c_uint64, self._held)
        self._call("cuMemcpyDtoDAsync_v2", *addresses, ctypes.c_size_t(HELD), self._stream)
        self._call("cuEventRecord", begin, self._stream)
        for _ in range(times):
            self.replay(graph)
        self._call("cuEventRecord", end, self._stream)
        clock = self.clock.read()
        self._call("cuEventSynchronize", end)
        self._call("cuEventElapsedTime", ctypes.byref(passed), begin, end)
        for event in (begin, end):
            self._call("cuEventDestroy_v2", event)
        return passed.value / 1000 / times, clock

    def close(self) -> None:
        """Give back what `time` copies."""
        for address in self._held or ():
            self.free(address)
        self._held = None

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._driver, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'unknown').decode()} ({code})")
