"""The TVM backend: text, vision and embedding libraries of a bundle, with key/value buffers updated in place.

Needs the packages `apache-tvm-ffi` and, of `apache-tvm`, the runtime library alone: no compiler is loaded. Weights are
handed to the libraries where they lie, in memory-mapped files; what no step touches is never read from disk.
Shapes: B batch rows, S new tokens per row, H hidden, K key/value heads, D head dimension, L slots that get logits,
k experts per token, M image placeholder tokens.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from arriero.errors import ArrieroError, MachineLacks
from arriero.runtimes.backend import (
    ADAPTER,
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
from arriero.runtimes.inside import climbs_out
from arriero.runtimes.private_library import PrivateLibrary

ALIGNMENT = 64
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's number on x86-64 and ARM; Python has the name since 3.13
CPU, POOLED = (1, 0), 2  # DLPack's device type and number; the kind of allocator
WEIGHT_DTYPES = {"FLOAT": np.float32, "BFLOAT16": np.uint16, "FLOAT16": np.float16, "UINT8": np.uint8}


class TvmBackend:
    """The compiled graphs of a bundle directory."""

    def __init__(
        self, bundle: Path, spec: ModelSpec, threads: int | None = None, sha256: Mapping[str, str] | None = None
    ) -> None:
        """Open the libraries in `bundle` for the model `spec`; `threads` and `sha256` are those of `BackendOptions`."""
        self.spec = spec
        self.threads = threads or usable_cores()
        files: dict[str, np.ndarray] = {}
        parts = ("text", "embed") if spec.vision is None else ("text", "embed", "vision")
        self._graphs = {part: _Graph(bundle, part, files, self.threads, sha256 or {}) for part in parts}
        # the tower is opened on the first image: a text-only app never pays for its memory
        for part in ("text", "embed"):
            self._graphs[part].open()

    def vision(self, pixel_values: Floats) -> Floats:
        """Turn tiles f32 [n, 3, h, w] into features f32 [n * tokens_per_tile, H]."""
        if self.spec.vision is None:
            raise no_vision()
        vision = self._graphs["vision"]
        vision.open()
        groups = (pixel_values[i : i + TILES_AT_ONCE] for i in range(0, len(pixel_values), TILES_AT_ONCE))
        return np.concatenate([vision.run({"pixel_values": _aligned(group)})[0] for group in groups])

    def embed(self, input_ids: Ints, image_features: Floats) -> Floats:
        """Embed ids i64 [B, S], image placeholders taking `image_features` f32 [M, H] in order: f32 [B, S, H]."""
        return self._graphs["embed"].run(
            {"input_ids": _aligned(input_ids), "image_features": _aligned(image_features)}
        )[0]

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
        text = self._graphs["text"]
        if ADAPTER in text.inputs:
            arguments[ADAPTER] = cache.adapters
        feeds: dict[str, np.ndarray] = {name: _aligned(np.asarray(array)) for name, array in arguments.items()}
        for number in range(len(self.spec.layers)):
            for kind, buffer in zip(("key", "value"), store.layer(number, cache.start, cache.stop), strict=True):
                feeds[f"past_{kind}.{number}"] = buffer
        if not captures:
            (logits,) = text.run(feeds, "step")
            cache.lengths += steps
            return StepOutput(logits)
        named = dict(zip(text.outputs, text.run(feeds), strict=True))
        cache.lengths += steps
        layers = range(len(self.spec.layers))
        return StepOutput(
            logits=named["logits"],
            expert_ids={number: named[name] for number in layers if (name := f"expert_id.{number}") in named},
            hiddens={number: named[f"hidden.{number}"] for number in layers},
        )

    def close(self) -> None:
        """Drop the libraries and their memory."""
        self._graphs.clear()


def open_backend(bundle: Path, spec: ModelSpec, options: BackendOptions) -> TvmBackend:
    """Open the libraries in `bundle` for the model `spec`."""
    return TvmBackend(bundle, spec, options.threads, options.sha256)


class _Graph:
    """One library with its weights, as they lie in the bundle when this is made; `open` loads them."""

    def __init__(
        self, bundle: Path, part: str, files: dict[str, np.ndarray], threads: int, sha256: Mapping[str, str]
    ) -> None:
        self._ffi, self._path, self._threads = load_runtime(), bundle / f"{part}.so", threads
        with self._refusal():
            signature = json.loads((bundle / f"{part}.json").read_text())
            self._library = PrivateLibrary(self._path, sha256.get(self._path.name))
            self.inputs, self.outputs = signature["inputs"], signature["outputs"]
            self._tables = [_table(bundle, entry, files) for entry in signature["experts"]]
            self._files = files  # the tables hold addresses, which keep no map alive
            self._entries = [(_map(bundle, entry["file"], files), entry) for entry in signature["weights"]]
        self._machine: Any = None

    def open(self) -> None:
        """Load the library and hand it its weights, unless that is done."""
        if self._machine is not None:
            return
        ffi = self._ffi
        with self._refusal():
            # TVM's own `load_module` would keep it for as long as the process runs
            load = ffi.get_global_func("ffi.Module.load_from_file.so")
            machine = self._library.open(lambda path: load(path, "so"))["vm_load_executable"]()
            machine["vm_initialization"](*CPU, POOLED)
        self._parts = ffi.from_dlpack(np.zeros(self._threads, np.uint8))
        weights = (_weight(file, entry) for file, entry in self._entries)
        self._weights = [ffi.from_dlpack(array) for array in (*self._tables, *weights)]
        self._machine = machine

    def run(self, feeds: Mapping[str, np.ndarray], function: str = "main") -> list[np.ndarray]:
        """Give the outputs of `function` over `feeds` (by input name), in order."""
        ffi = self._ffi
        use_threads(self._threads)
        arguments = [self._parts if name == "threads" else ffi.from_dlpack(feeds[name]) for name in self.inputs]
        results = self._machine[function](*arguments, *self._weights)
        return [np.from_dlpack(item) for item in (results if isinstance(results, ffi.Array) else [results])]

    @contextmanager
    def _refusal(self) -> Iterator[None]:
        """Make one of our errors of what goes wrong in the block."""
        try:
            yield
        except ArrieroError:
            raise
        except Exception as error:
            raise ArrieroError(
                f"TVM's runtime refuses the library: {(str(error).splitlines() or [repr(error)])[0]}",
                where=str(self._path),
                remedy="Rebuild the bundle with `arriero build`",
            ) from error


_configured = threading.local()


def use_threads(threads: int) -> None:
    """Let the calling thread's next run use `threads` threads; TVM keeps a pool of workers per calling thread."""
    if getattr(_configured, "threads", None) != threads:
        import tvm_ffi

        tvm_ffi.get_global_func("runtime.config_threadpool")(1, threads)
        _configured.threads = threads


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
    # Between a step's operators workers look for the next task rather than sleep, but not for the 300,000 looks of
    # TVM's own choice: a fifth of a second of every core after every answer, minutes where others compute, and as long
    # until the threads of a session that is closed have ended.
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "1000")
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


def _map(bundle: Path, name: str, files: dict[str, np.ndarray]) -> np.ndarray:
    """A file of weights; each is mapped once, copy-on-write because DLPack wants it writable.

    Nothing ever writes there, so no memory is set aside for copies: a file may be larger than the memory.
    """
    if climbs_out(name):
        raise ValueError(f"its weights are in {name!r}, outside the bundle")
    if name not in files:
        with (bundle / name).open("rb") as opened:
            flags, writable = mmap.MAP_PRIVATE | NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            files[name] = np.frombuffer(mmap.mmap(opened.fileno(), 0, flags=flags, prot=writable), np.uint8)
    return files[name]


def _table(bundle: Path, entry: Mapping[str, Any], files: dict[str, np.ndarray]) -> np.ndarray:
    """The table i64 [1 + E] of a layer's experts, all of them mapped: no cache, and where each record lies."""
    addresses = [_map(bundle, name, files).ctypes.data + offset for name, offset in entry["records"]]
    return _aligned(np.array([0, *addresses], np.int64))


def _weight(file: np.ndarray, entry: Mapping[str, Any]) -> np.ndarray:
    """A weight where it lies in its file."""
    dtype = np.dtype(WEIGHT_DTYPES[entry["dtype"]])
    count = int(np.prod(entry["shape"], dtype=np.int64)) * dtype.itemsize
    data: np.ndarray = file[entry["offset"] : entry["offset"] + count]
    weight = data.view(dtype).reshape(entry["shape"])
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
