"""A stand-in for `cuda.bindings.runtime` over the host's memory, as strict as a GPU is about what one sees too late.

Calls are held against the recorded signatures. Memory of the "GPU" has addresses that the host cannot read, and starts
full of NaN. Work is queued per stream and done only when that stream is waited for: what is read before, or overwritten
while still queued, comes out wrong. Whatever CUDA leaves undefined is a fault here, kept in `faults`.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.tensorrt.recorder import Recorder

FIRST_ADDRESS = 1 << 44
ALIGNMENT = 256
BROKEN = "cudaErrorIllegalAddress"  # how work ends that touched memory which is not its own
Work = Callable[[], None]


class cudaHandle:
    """A stream, a graph or an executable graph."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.queue: list[Work] = []
        self.capturing: int | None = None  # the thread that captures
        self.broken = False

    def __int__(self) -> int:
        return self.number


class FakeCuda:
    """One GPU of architecture `arch` with `room` bytes; `runtime` is the module."""

    def __init__(self, version: str = "cuda_13", arch: tuple[int, int] = (8, 9), room: int = 1 << 30) -> None:
        self.recorder = Recorder(version)
        self.runtime = self.recorder.module
        self.arch, self.room = arch, room
        self.faults: list[str] = []
        self.device: dict[int, NDArray[np.uint8]] = {}
        self.pinned: dict[int, NDArray[np.uint8]] = {}
        self.given_back: list[NDArray[np.uint8]] = []  # what was pinned: the host can still read it, full of NaN now
        self.handles: dict[int, cudaHandle] = {}
        self.launches = self.captures = 0
        self.failing: dict[str, tuple[int, str]] = {}  # function -> calls until it fails, and how
        self._next, self._count = FIRST_ADDRESS, 0
        self._lock = threading.RLock()
        for name in (method.removeprefix("_") for method in vars(FakeCuda) if method.startswith("_cuda")):
            self.recorder.answer(name, self._guarded(name, getattr(self, f"_{name}")))

    def fail(self, function: str, error: str, after: int = 0) -> None:
        """Let a function fail once, after so many calls that succeed."""
        self.failing[function] = (after, error)

    def view(self, address: int, nbytes: int) -> NDArray[np.uint8]:
        """The memory of the GPU at `address`; a fault outside what is allocated."""
        found = self._inside(self.device, address, nbytes)
        if found is None:
            raise AssertionError(f"{nbytes} bytes at {address:#x} are not memory of the GPU, or freed")
        return found

    def enqueue(self, stream: int, work: Work) -> bool:
        """Queue work as a library does that is given a stream; False when there is no such stream."""
        with self._lock:
            if stream not in self.handles:
                self.faults.append(f"work for the stream {stream}, which is none of ours")
                return False
            self.handles[stream].queue.append(work)
            return True

    def is_capturing(self, stream: int) -> bool:
        """Whether work for the stream is recorded instead of done."""
        return self.handles[stream].capturing is not None

    @property
    def held(self) -> dict[str, int]:
        """What has not been given back."""
        return {"memory": len(self.device), "pinned": len(self.pinned), "handles": len(self.handles)}

    # --- inside

    def _guarded(self, name: str, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        errors = self.runtime.cudaError_t

        def call(**arguments: Any) -> tuple[Any, ...]:
            with self._lock:
                if name in self.failing:
                    left, error = self.failing.pop(name)
                    if left == 0:
                        return (getattr(errors, error), None)
                    self.failing[name] = (left - 1, error)
                found = behaviour(**arguments)
            if isinstance(found, str):
                return (getattr(errors, found), None)
            return (errors.cudaSuccess, *(found if isinstance(found, tuple) else () if found is None else (found,)))

        return call

    def _inside(self, memory: dict[int, NDArray[np.uint8]], address: int, nbytes: int) -> NDArray[np.uint8] | None:
        starts = sorted(memory)
        number = bisect.bisect_right(starts, address) - 1
        if number < 0:
            return None
        block = memory[starts[number]]
        offset = address - starts[number]
        return block[offset : offset + nbytes] if offset + nbytes <= len(block) else None

    def _handle(self) -> cudaHandle:
        self._count += 1
        handle = cudaHandle(0x1000 + self._count)
        self.handles[handle.number] = handle
        return handle

    def _unsafe(self) -> str | None:
        """Why this thread may not allocate, free or wait now: it captures, and the capture is broken by it."""
        for handle in self.handles.values():
            if handle.capturing == threading.get_ident():
                handle.broken = True
                return "cudaErrorStreamCaptureUnsupported"
        return None

    def _known(self, handle: Any) -> cudaHandle:
        assert int(handle) in self.handles, f"{int(handle):#x} is no handle, or destroyed"
        return self.handles[int(handle)]

    # --- the functions

    def _cudaGetDeviceCount(self) -> Any:
        return 1

    def _cudaSetDevice(self, device: int) -> Any:
        return None if device == 0 else "cudaErrorInvalidDevice"

    def _cudaDeviceGetAttribute(self, attr: Any, device: int) -> Any:
        names = ("cudaDevAttrComputeCapabilityMajor", "cudaDevAttrComputeCapabilityMinor")
        return self.arch[names.index(attr.name)]

    def _cudaGetErrorString(self, error: Any) -> Any:
        return b"told in words: " + error.name.encode()

    def _cudaGetLastError(self) -> Any:
        return None

    def _cudaMalloc(self, size: int) -> Any:
        if error := self._unsafe():
            return error
        if sum(map(len, self.device.values())) + size > self.room:
            return "cudaErrorMemoryAllocation"
        address = self._next
        self._next += -(-size // ALIGNMENT) * ALIGNMENT + ALIGNMENT
        self.device[address] = np.full(size, 0xFF, np.uint8)
        return address

    def _cudaHostAlloc(self, size: int, flags: int) -> Any:
        if error := self._unsafe():
            return error
        block = np.full(size, 0xFF, np.uint8)
        self.pinned[block.ctypes.data] = block
        return block.ctypes.data

    def _cudaFree(self, devPtr: int) -> Any:
        return self._release(self.device, devPtr)

    def _cudaFreeHost(self, ptr: int) -> Any:
        return self._release(self.pinned, ptr)

    def _release(self, memory: dict[int, NDArray[np.uint8]], address: int) -> Any:
        if error := self._unsafe():
            self.faults.append("memory is freed while a capture is under way")
            return error
        if address not in memory:
            self.faults.append(f"{address:#x} is freed twice, or was never allocated")
            return "cudaErrorInvalidValue"
        block = memory.pop(address)
        if memory is self.pinned:
            block.fill(0xFF)
            self.given_back.append(block)
        return None

    def _cudaStreamCreateWithFlags(self, flags: int) -> Any:
        assert flags in (0, 1)
        return self._handle()

    def _cudaStreamDestroy(self, stream: Any) -> Any:
        if self._known(stream).queue:
            self.faults.append("a stream is destroyed with work in it")
        return self._forget(stream)

    def _cudaGraphDestroy(self, graph: Any) -> Any:
        return self._forget(graph)

    def _cudaGraphExecDestroy(self, graphExec: Any) -> Any:
        return self._forget(graphExec)

    def _forget(self, handle: Any) -> None:
        self._known(handle)
        del self.handles[int(handle)]

    def _cudaStreamSynchronize(self, stream: Any) -> Any:
        if error := self._unsafe():
            return error
        known = self._known(stream)
        while known.queue:
            known.queue.pop(0)()
        return None

    def _cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: Any, stream: Any) -> Any:
        rows = (dst, count, src, count, count, 1)
        return self._copy(*rows, kind, stream)

    def _cudaMemcpy2DAsync(
        self, dst: int, dpitch: int, src: int, spitch: int, width: int, height: int, kind: Any, stream: Any
    ) -> Any:
        if width > dpitch or width > spitch:
            return "cudaErrorInvalidPitchValue"
        return self._copy(dst, dpitch, src, spitch, width, height, kind, stream)

    def _copy(
        self, dst: int, dpitch: int, src: int, spitch: int, width: int, height: int, kind: Any, stream: Any
    ) -> Any:
        source, _, target = kind.name.rpartition("Memcpy")[2].partition("To")
        memories = {"Host": self.pinned, "Device": self.device}

        def work() -> None:
            for row in range(height):
                into = self._inside(memories[target], dst + row * dpitch, width)
                out = self._inside(memories[source], src + row * spitch, width)
                assert into is not None, f"a copy goes to {dst:#x}, which is not allocated {target} memory"
                assert out is not None, f"a copy comes from {src:#x}, which is not allocated {source} memory"
                into[:] = out.copy()

        return self._queue(stream, work)

    def _cudaMemsetAsync(self, devPtr: int, value: int, count: int, stream: Any) -> Any:
        return self._queue(stream, lambda: self.view(devPtr, count).fill(value))

    def _queue(self, stream: Any, work: Work) -> Any:
        self._known(stream).queue.append(work)
        return None

    def _cudaStreamBeginCapture(self, stream: Any, mode: Any) -> Any:
        known = self._known(stream)
        if known.queue:
            self.faults.append("a capture begins while work is queued that it would swallow")
        assert mode.name == "cudaStreamCaptureModeThreadLocal"
        known.capturing, known.broken = threading.get_ident(), False
        return None

    def _cudaStreamEndCapture(self, stream: Any) -> Any:
        known = self._known(stream)
        if known.capturing != threading.get_ident():
            return "cudaErrorStreamCaptureWrongThread"
        recorded, known.queue, known.capturing = known.queue, [], None
        if known.broken:
            return "cudaErrorStreamCaptureInvalidated"
        graph = self._handle()
        graph.queue = recorded
        self.captures += 1
        return graph

    def _cudaGraphInstantiate(self, graph: Any, flags: int) -> Any:
        made = self._handle()
        made.queue = list(self._known(graph).queue)
        return made

    def _cudaGraphLaunch(self, graphExec: Any, stream: Any) -> Any:
        self._known(stream).queue.extend(self._known(graphExec).queue)
        self.launches += 1
        return None
