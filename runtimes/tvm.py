"""The TVM backend: text, vision and embedding libraries of a bundle, with key/value buffers updated in place.

Needs the packages `apache-tvm-ffi` and, of `apache-tvm`, the runtime library alone: no compiler is loaded. Weights are
handed to the libraries where they lie, in memory-mapped files; what no step touches is never read from disk.
Shapes: B batch rows, S new tokens per row, H hidden, K key/value heads, D head dimension, L slots that get logits,
k experts per token, M image placeholder tokens.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arriero.errors import ArrieroError, MachineLacks
from arriero.runtimes.backend import (
    TILES_AT_ONCE,
    BackendOptions,
    Cache,
    Floats,
    Ints,
    ModelSpec,
    StepOutput,
    no_vision,
)
from arriero.runtimes.cache import KVCache, check_step
from arriero.runtimes.cache_rows import CacheRows
from arriero.runtimes.cpu import usable_cores

if TYPE_CHECKING:
    import tvm_ffi

ALIGNMENT = 64
CPU, POOLED = (1, 0), 2  # DLPack's device type and number; the kind of allocator
WEIGHT_DTYPES = {"FLOAT": np.float32, "BFLOAT16": np.uint16, "FLOAT16": np.float16, "UINT8": np.uint8}


class TvmBackend:
    """The compiled graphs of a bundle directory."""

    def __init__(self, bundle: Path, spec: ModelSpec, threads: int | None = None) -> None:
        """Open the libraries in `bundle` for the model `spec`; `threads` None means every core we may use."""
        self.spec = spec
        self.threads = threads or usable_cores()
        self._bundle = bundle
        self._files: dict[str, np.memmap] = {}
        self._text = _Graph(bundle, "text", self._files, self.threads)
        self._embed = _Graph(bundle, "embed", self._files, self.threads)
        self._vision: _Graph | None = None
        self._vision_lock = threading.Lock()

    def vision(self, pixel_values: Floats) -> Floats:
        """Turn tiles f32 [n, 3, h, w] into features f32 [n * tokens_per_tile, H]."""
        if self.spec.vision is None:
            raise no_vision()
        with self._vision_lock:
            if self._vision is None:
                # opened on the first image: a text-only app never pays for the tower's memory
                self._vision = _Graph(self._bundle, "vision", self._files, self.threads)
        groups = (pixel_values[i : i + TILES_AT_ONCE] for i in range(0, len(pixel_values), TILES_AT_ONCE))
        return np.concatenate([self._vision.run({"pixel_values": _aligned(group)})[0] for group in groups])

    def embed(self, input_ids: Ints, image_features: Floats) -> Floats:
        """Embed ids i64 [B, S], image placeholders taking `image_features` f32 [M, H] in order: f32 [B, S, H]."""
        return self._embed.run({"input_ids": _aligned(input_ids), "image_features": _aligned(image_features)})[0]

    def new_cache(self, batch: int, capacity: int) -> CacheRows[KVCache]:
        """Give an empty cache for `batch` rows of at most `capacity` tokens."""
        return CacheRows.whole(KVCache(self.spec, batch, capacity))

    def forward(
        self, inputs_embeds: Floats, positions: Ints, cache: Cache, logits_index: Ints, captures: bool = False
    ) -> StepOutput:
        """Run `inputs_embeds` [B, S, H]; see `Backend.forward`. The cache must come from `new_cache`."""
        assert isinstance(cache, CacheRows)
        store = cache.store
        assert isinstance(store, KVCache)
        steps = positions.shape[1]
        check_step(positions, cache)
        store.reserve(int(cache.lengths.max()) + steps)
        arguments = {"inputs_embeds": inputs_embeds, "positions": positions, "logits_index": logits_index}
        feeds: dict[str, np.ndarray] = {name: _aligned(np.asarray(array)) for name, array in arguments.items()}
        for number in range(len(self.spec.layers)):
            for kind, buffer in zip(("key", "value"), store.layer(number, cache.start, cache.stop), strict=True):
                feeds[f"past_{kind}.{number}"] = buffer
        if not captures:
            (logits,) = self._text.run(feeds, "step")
            cache.lengths += steps
            return StepOutput(logits)
        named = dict(zip(self._text.outputs, self._text.run(feeds), strict=True))
        cache.lengths += steps
        layers = range(len(self.spec.layers))
        return StepOutput(
            logits=named["logits"],
            expert_ids={number: named[name] for number in layers if (name := f"expert_id.{number}") in named},
            hiddens={number: named[f"hidden.{number}"] for number in layers},
        )

    def close(self) -> None:
        """Drop the libraries and their memory."""
        del self._text, self._embed
        self._vision = None
        self._files.clear()


def open_backend(bundle: Path, spec: ModelSpec, options: BackendOptions) -> TvmBackend:
    """Open the libraries in `bundle` for the model `spec`."""
    return TvmBackend(bundle, spec, options.threads)


class _Graph:
    """One library with its weights; several threads may run it at once, each on a machine of its own."""

    def __init__(self, bundle: Path, part: str, files: dict[str, np.memmap], threads: int) -> None:
        ffi = load_runtime()
        path = bundle / f"{part}.so"
        try:
            signature = json.loads((bundle / f"{part}.json").read_text())
            self._library = ffi.load_module(str(path))
        except Exception as error:
            raise ArrieroError(
                f"TVM's runtime refuses the library: {str(error).splitlines()[0]}",
                where=str(path),
                remedy="Rebuild the bundle with `arriero build`",
            ) from error
        self.inputs, self.outputs = signature["inputs"], signature["outputs"]
        self._threads = threads
        self._parts = ffi.from_dlpack(np.zeros(threads, np.uint8))
        self._weights = [ffi.from_dlpack(_map(bundle, entry, files)) for entry in signature["weights"]]
        self._idle: queue.SimpleQueue[tvm_ffi.Module] = queue.SimpleQueue()

    def run(self, feeds: Mapping[str, np.ndarray], function: str = "main") -> list[np.ndarray]:
        """Give the outputs of `function` over `feeds` (by input name), in order."""
        import tvm_ffi

        use_threads(self._threads)
        try:
            machine = self._idle.get_nowait()
        except queue.Empty:
            machine = self._library["vm_load_executable"]()
            machine["vm_initialization"](*CPU, POOLED)
        arguments = [self._parts if name == "threads" else tvm_ffi.from_dlpack(feeds[name]) for name in self.inputs]
        try:
            results = machine[function](*arguments, *self._weights)
        finally:
            self._idle.put(machine)
        return [np.from_dlpack(item) for item in (results if isinstance(results, tvm_ffi.Array) else [results])]


_configured = threading.local()


def use_threads(threads: int) -> None:
    """Let the calling thread's next run use `threads` threads; TVM keeps a pool of workers per calling thread."""
    process, configured = getattr(_configured, "pool", (os.getpid(), None))
    if process != os.getpid():  # it would wait for workers that did not come along
        raise ArrieroError(
            "TVM was used in this process before it was forked",
            expected="a pool of threads that is this process's own",
            remedy="Start the process by spawn, or load bundles after the fork only",
        )
    if configured != threads:
        import tvm_ffi

        tvm_ffi.get_global_func("runtime.config_threadpool")(1, threads)
        _configured.pool = process, threads


def load_runtime() -> Any:
    """The module `tvm_ffi` with TVM's runtime library loaded. Raises MachineLacks with the package that is missing."""
    package = find_spec("tvm")
    if package is None or find_spec("tvm_ffi") is None:
        missing = "apache-tvm" if package is None else "apache-tvm-ffi"
        raise MachineLacks(
            f"the package {missing} is not installed", remedy="Install it with `pip install 'arriero[tvm]'`"
        )
    # The pool would otherwise pin its threads to cores, which on an edge device are the app's cores too.
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    # And on x86 it would use every second core only, taking the others for hyper-threads.
    os.environ.setdefault("TVM_NUM_THREADS", str(usable_cores()))
    with _unseen("torch"):
        import tvm_ffi

    if tvm_ffi.get_global_func("runtime.config_threadpool", allow_missing=True) is None:
        folders = [Path(place) / "lib" for place in package.submodule_search_locations or ()]
        tvm_ffi.libinfo.load_lib_ctypes("tvm", "tvm_runtime", "RTLD_GLOBAL", extra_lib_paths=folders)
    return tvm_ffi


@contextmanager
def _unseen(package: str) -> Iterator[None]:
    """Hide an installed package that is not loaded yet: `tvm_ffi` imports PyTorch only because it is there."""
    hide = package not in sys.modules
    if hide:
        sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hide:
            del sys.modules[package]


def _map(bundle: Path, entry: Mapping[str, Any], files: dict[str, np.memmap]) -> np.ndarray:
    """A weight where it lies in its file; each file is mapped once, copy-on-write because DLPack wants it writable."""
    name, dtype = entry["file"], np.dtype(WEIGHT_DTYPES[entry["dtype"]])
    if name not in files:
        files[name] = np.memmap(bundle / name, mode="c")
    count = int(np.prod(entry["shape"], dtype=np.int64)) * dtype.itemsize
    data: np.ndarray = files[name][entry["offset"] : entry["offset"] + count]
    weight = data.view(np.ndarray).view(dtype).reshape(entry["shape"])
    return _aligned(weight) if entry["aligned"] else weight


def _aligned(array: np.ndarray) -> np.ndarray:
    """`array`, or a copy of it, contiguous and at an address that generated code may rely on."""
    array = np.ascontiguousarray(array)
    # numpy gives an empty array strides of zero, which TVM does not take for contiguous
    if array.size and array.ctypes.data % ALIGNMENT == 0:
        return array
    room = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    copy: np.ndarray = np.ndarray(array.shape, array.dtype, room, start)
    copy[...] = array
    return copy
