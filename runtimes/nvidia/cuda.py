"""One GPU through `cuda-python`: its memory, pinned memory, streams and graphs, all freed together.

Every call's result is checked; what CUDA says becomes an error that names the call and what to do.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from arriero.errors import ArrieroError, MachineLacks
from arriero.runtimes.broken_package import importing
from arriero.traits import install

DRIVER = "Install NVIDIA's driver for this GPU (on a Jetson it comes with JetPack), or pass the GPU into the container"
ROOM = "Close what else uses the GPU, lower `context` or `batch`, or choose a profile with fewer bits"
# CUDA's names of what the machine lacks, and what to do about each; anything else is a fault of ours or of the driver.
LACKS = {
    "cudaErrorNoDevice": DRIVER,
    "cudaErrorInsufficientDriver": DRIVER,
    "cudaErrorSystemDriverMismatch": "Restart the machine: the driver was updated while it ran",
    "cudaErrorMemoryAllocation": ROOM,
}
AGAIN = "Load the bundle again"
BLOCK = 512  # bytes that an allocation is rounded up to; an empty tensor needs an address too


def load_cuda(extra: str = "tensorrt") -> Any:
    """The module `cuda.bindings.runtime`. Raises MachineLacks with the package that is missing or does not load."""
    absent = MachineLacks("the package cuda-bindings is not installed", remedy=f"Install it with `{install(extra)}`")
    with importing("cuda", "cuda.bindings", absent=absent):
        from cuda.bindings import runtime
    return runtime


class Device:
    """The first GPU that this process may use, and everything that was taken from it until `close`."""

    def __init__(self, runtime: Any) -> None:
        """Open the GPU through the module `cuda.bindings.runtime`. Raises MachineLacks where there is none."""
        self.runtime = runtime
        self._lock = threading.Lock()
        self._taken: dict[int, tuple[str, Any]] = {}  # number -> the function that gives it back, and what
        self._count = 0
        self._closed = False
        self._thread = threading.local()  # `later`: what this thread gives back once it is through with a capture
        # without a GPU this answers with the error that says why
        (devices,) = self.call("cudaGetDeviceCount")
        if not devices:
            raise MachineLacks("there is no NVIDIA GPU on this machine", remedy=DRIVER)
        self.call("cudaSetDevice", 0)
        major, minor = (self._attribute(f"cudaDevAttrComputeCapability{part}") for part in ("Major", "Minor"))
        self.arch = f"sm_{major}{minor}"

    def _attribute(self, name: str) -> int:
        return int(self.call("cudaDeviceGetAttribute", getattr(self.runtime.cudaDeviceAttr, name), 0)[0])

    def call(self, function: str, *arguments: Any) -> tuple[Any, ...]:
        """Call a function of the CUDA runtime and give what it returns beside its status. Raises on any failure.

        After `close` every call is refused: a cache that somebody still holds has no memory any more.
        """
        if self._closed:
            raise ArrieroError("the session is closed, and its memory of the GPU given back", remedy=AGAIN)
        status, *values = getattr(self.runtime, function)(*arguments)
        if status != self.runtime.cudaError_t.cudaSuccess:
            raise self._error(function, status)
        return tuple(values)

    def _error(self, function: str, status: Any) -> ArrieroError:
        name = getattr(status, "name", str(status))
        self.runtime.cudaGetLastError()  # forgotten by CUDA too, so that the next call does not report it again
        said = self.runtime.cudaGetErrorString(status)[1]
        said = said.decode() if isinstance(said, bytes) else str(said)
        if name in LACKS:
            return MachineLacks(f"{function} failed: {said} ({name})", remedy=LACKS[name])
        remedy = "Load the bundle again; if it stays so, report it together with this sentence"
        return ArrieroError(f"{function} failed: {said} ({name})", where="GPU", remedy=remedy)

    def take(self, give_back: str, what: Any) -> int:
        """Note that `what` is to be given back with the function `give_back`; gives its number for `give`."""
        with self._lock:
            self._count += 1
            self._taken[self._count] = (give_back, what)
            return self._count

    def give(self, number: int) -> None:
        """Give back what `take` noted; nothing happens the second time."""
        later: list[int] | None = getattr(self._thread, "later", None)
        if later is not None:
            # Python's garbage collector may come at any time, and freeing would break this thread's capture
            later.append(number)
            return
        with self._lock:
            function, what = self._taken.pop(number, ("", None))
        if function:
            # What cannot be given back is lost either way, and the error that led here must not be hidden by another.
            getattr(self.runtime, function)(what)

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Within the block, what this thread gives back is kept; it is given back at the end."""
        later: list[int] = []
        self._thread.later = later
        try:
            yield
        finally:
            self._thread.later = None
            for number in later:
                self.give(number)

    def memory(self, nbytes: int) -> Memory:
        """Take at least `nbytes` of the GPU's memory, given back when the result is dropped or freed."""
        size = -(-max(nbytes, 1) // BLOCK) * BLOCK
        (address,) = self.call("cudaMalloc", size)
        return Memory(self, int(address), size, self.take("cudaFree", address))

    def pinned(self, nbytes: int) -> Pinned:
        """Take at least `nbytes` of memory that the GPU copies from and to without the processor."""
        size = -(-max(nbytes, 1) // BLOCK) * BLOCK
        (address,) = self.call("cudaHostAlloc", size, 0)
        return Pinned(self, int(address), size, self.take("cudaFreeHost", address))

    def stream(self) -> Stream:
        """Make a stream; work on it waits for no other stream."""
        (handle,) = self.call("cudaStreamCreateWithFlags", 1)  # non-blocking
        return Stream(self, handle)

    def close(self) -> None:
        """Give back everything, newest first."""
        self._closed = True
        for number in sorted(self._taken, reverse=True):
            self.give(number)


class Memory:
    """Memory at `address`, freed when this is dropped."""

    def __init__(self, device: Device, address: int, nbytes: int, number: int) -> None:
        self.address, self.nbytes = address, nbytes
        # a finalizer: a cache belongs to whoever asked for it, and nobody closes a cache
        self._free = weakref.finalize(self, device.give, number)

    def free(self) -> None:
        """Give the memory back now."""
        self._free()


class Pinned(Memory):
    """Memory of the host that the GPU reads and writes directly."""

    def array(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Its beginning as an array; valid as long as this is."""
        kind = np.dtype(dtype)
        count = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        raw = (ctypes.c_uint8 * count).from_address(self.address)
        return np.frombuffer(raw, np.uint8).view(kind).reshape(shape)


class Stream:
    """A queue of work for the GPU: copies, launches, graphs."""

    def __init__(self, device: Device, handle: Any) -> None:
        self.device, self.handle = device, handle
        self._number = device.take("cudaStreamDestroy", handle)

    def __int__(self) -> int:
        return int(self.handle)

    def to_device(self, address: int, source: Memory, nbytes: int) -> None:
        """Queue a copy of the first `nbytes` of pinned `source` to `address` on the GPU."""
        self._copy(address, source.address, nbytes, "cudaMemcpyHostToDevice")

    def to_host(self, target: Memory, address: int, nbytes: int) -> None:
        """Queue a copy of `nbytes` at `address` on the GPU to pinned `target`."""
        self._copy(target.address, address, nbytes, "cudaMemcpyDeviceToHost")

    def within(self, target: int, source: int, nbytes: int) -> None:
        """Queue a copy from one address on the GPU to another."""
        self._copy(target, source, nbytes, "cudaMemcpyDeviceToDevice")

    def _copy(self, target: int, source: int, nbytes: int, way: str) -> None:
        if nbytes:
            kind = getattr(self.device.runtime.cudaMemcpyKind, way)
            self.device.call("cudaMemcpyAsync", target, source, nbytes, kind, self.handle)

    def spread(self, target: int, wide: int, source: int, narrow: int, rows: int) -> None:
        """Queue a copy of `rows` rows of `narrow` bytes on the GPU into rows that are `wide` bytes apart."""
        self._copy_rows(target, wide, source, narrow, narrow, rows, "cudaMemcpyDeviceToDevice")

    def gather(self, target: Memory, address: int, pitch: int, width: int, rows: int) -> None:
        """Queue a copy of `rows` rows on the GPU, `width` bytes each and `pitch` apart, to pinned `target`, packed."""
        self._copy_rows(target.address, width, address, pitch, width, rows, "cudaMemcpyDeviceToHost")

    def scatter(self, address: int, pitch: int, source: Memory, width: int, rows: int) -> None:
        """Queue a copy of `rows` packed rows of `width` bytes in pinned `source` to the GPU, `pitch` bytes apart."""
        self._copy_rows(address, pitch, source.address, width, width, rows, "cudaMemcpyHostToDevice")

    def _copy_rows(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int, way: str
    ) -> None:
        if width:
            kind = getattr(self.device.runtime.cudaMemcpyKind, way)
            self.device.call(
                "cudaMemcpy2DAsync", target, target_pitch, source, source_pitch, width, rows, kind, self.handle
            )

    def zero(self, address: int, nbytes: int) -> None:
        """Queue the filling of memory with zeros."""
        self.device.call("cudaMemsetAsync", address, 0, nbytes, self.handle)

    def wait(self) -> None:
        """Return when all that was queued is done."""
        self.device.call("cudaStreamSynchronize", self.handle)

    def settle(self) -> None:
        """Wait for what was queued before a failure, so that its memory may be freed; the failure is known already."""
        self.device.runtime.cudaStreamSynchronize(self.handle)
        self.device.runtime.cudaGetLastError()

    def capture(self, work: Callable[[], None]) -> Graph:
        """Record what `work` queues on this stream, without doing it, as a graph. Raises what `work` raises."""
        with self.device.keeping():
            return self._capture(work)

    def _capture(self, work: Callable[[], None]) -> Graph:
        # of this thread alone: other threads go on allocating and copying meanwhile
        mode = self.device.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.device.call("cudaStreamBeginCapture", self.handle, mode)
        try:
            work()
        except BaseException:
            # the stream must leave capture mode; that the capture is broken is known already
            _, *made = self.device.runtime.cudaStreamEndCapture(self.handle)
            if made and made[0] is not None and int(made[0]):
                self.device.runtime.cudaGraphDestroy(made[0])
            self.device.runtime.cudaGetLastError()
            raise
        (graph,) = self.device.call("cudaStreamEndCapture", self.handle)
        try:
            (executable,) = self.device.call("cudaGraphInstantiate", graph, 0)
        finally:
            self.device.call("cudaGraphDestroy", graph)
        return Graph(self.device, executable)

    def close(self) -> None:
        """Give the stream back."""
        self.device.give(self._number)


class Graph:
    """Recorded work that one call starts."""

    def __init__(self, device: Device, handle: Any) -> None:
        self._device, self._handle = device, handle
        self._number = device.take("cudaGraphExecDestroy", handle)

    def launch(self, stream: Stream) -> None:
        """Queue the recorded work on `stream`."""
        self._device.call("cudaGraphLaunch", self._handle, stream.handle)

    def close(self) -> None:
        """Give the graph back."""
        self._device.give(self._number)
