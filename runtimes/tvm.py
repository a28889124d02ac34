"""The TVM backend: text, vision and embedding libraries of a bundle, with key/value buffers updated in place.

Needs the packages `apache-tvm-ffi` and, of `apache-tvm`, the runtime library alone: no compiler is loaded. Weights are
handed to the libraries where they lie, in memory-mapped files; what no step touches is never read from disk. Under a
cap on memory those that every token reads are read once, and experts come and go in a cache of the library's own; the
embedding's table stays mapped.
Shapes: B batch rows, S new tokens per row, T new tokens of all rows, H hidden, V vocabulary, K key/value heads, D head
dimension, L slots that get logits, k experts per token, M image placeholder tokens.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
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
    Between,
    Cache,
    CacheStatistics,
    Floats,
    Ints,
    MemoryCap,
    ModelSpec,
    StepGivenUp,
    StepOutput,
    no_vision,
)
from arriero.runtimes.broken_package import does_not_load, naming_broken_packages
from arriero.runtimes.cache import KVCache, check_step
from arriero.runtimes.cache_rows import CacheRows
from arriero.runtimes.cpu import usable_cores
from arriero.runtimes.expert_cache import ExpertCache
from arriero.runtimes.forced_routing import PREFIX, forced_inputs, takes_routing
from arriero.runtimes.memory import anonymous_memory
from arriero.runtimes.memory_cap import MemoryShare, RecordSize, pooled_bytes, share_memory, step_bytes
from arriero.runtimes.private_library import PrivateLibrary
from arriero.runtimes.step_memory import StepMemory
from arriero.runtimes.weight_files import MappedWeights, ReadWeights, WeightFiles, aligned, entry_bytes
from arriero.traits import PREFILL_PIECE, install

PANEL = 16  # output features in each row of a packed matrix
CPU = 1, 0  # DLPack's device type and number
# Of libraries: takes the address of what is called between parts of a step, some milliseconds of work each, and gives
# the seconds in which it need not be called again.
BETWEEN_PARTS = "arriero_between_parts"
NAIVE, POOLED = 1, 2  # allocators: what keeps the memory of every size that was asked for is not for a cap
Machine = Callable[[str], Any]  # of TVM: gives each function of a library, ready to run


class TvmBackend:
    """The compiled graphs of a bundle directory."""

    few_rows = 8  # as `row_product` of the kernels has it

    def __init__(
        self,
        bundle: Path,
        spec: ModelSpec,
        threads: int | None = None,
        sha256: Mapping[str, str] | None = None,
        memory: MemoryCap | None = None,
    ) -> None:
        """Open the libraries in `bundle` for the model `spec`; the rest is that of `BackendOptions`."""
        self.spec = spec
        self.threads = threads or usable_cores()
        parts = ("text", "embed") if spec.vision is None else ("text", "embed", "vision")
        self._graphs = {part: _Graph(bundle, part, self.threads, sha256 or {}) for part in parts}
        text = self._graphs["text"]
        weights: WeightFiles = MappedWeights(bundle) if memory is None else ReadWeights(bundle)
        layers = [entry for entry in text.weights if ".layers." in entry["name"]]
        widths = [entry["shape"][0] * (PANEL if entry["dtype"] == "UINT8" else 1) for entry in layers]
        self._widest = max(widths, default=0)
        share = MemoryShare((), PREFILL_PIECE)
        if memory is not None:
            sizes, item_bytes = text.sizes(), text.cache.itemsize
            share = share_memory(
                memory, anonymous_memory(), self._core_bytes(), sizes, spec, self._step_bytes, item_bytes
            )
        self.piece = share.piece
        # of the embedding's table a token needs a row: it stays in its file, under a cap too
        rows = weights if memory is None else MappedWeights(bundle)
        for part, graph in self._graphs.items():
            graph.bind(rows if part == "embed" else weights)
        # the tower is opened on the first image: a text-only app never pays for its memory
        for part in ("text", "embed"):
            self._graphs[part].open(POOLED if memory is None else NAIVE)
        largest = pooled_bytes(spec, self._widest, self.piece, 0, False)
        self._memory = StepMemory(largest, _empty_pool) if memory is None else None
        self.packs, self.forces_routing = text.packs, takes_routing(spec, text.inputs)
        # a cap has room for one step, and bundles from before lack the function
        self.preemptible = memory is None and text.library.implements_function(BETWEEN_PARTS, True)
        unforced = aligned(np.empty((0, spec.num_experts_per_tok), np.int64))
        self._unforced = {name: unforced for name in text.inputs if name.startswith(PREFIX)}
        self._experts = (
            ExpertCache(bundle, text.library, text.experts, text.tables, share.slots) if share.slots else None
        )

    def statistics(self) -> CacheStatistics:
        """How the caches of experts did; no layers where all weights are mapped."""
        return CacheStatistics() if self._experts is None else self._experts.statistics()

    def _core_bytes(self) -> int:
        """Bytes of the weights that are read whole, each once, whatever graphs share it."""
        entries = [entry for part, graph in self._graphs.items() if part != "embed" for entry in graph.weights]
        return sum({(entry["file"], entry["offset"]): entry_bytes(entry) for entry in entries}.values())

    def _step_bytes(self, tokens: int) -> int:
        """What a step of so many tokens computes in, at most."""
        return step_bytes(self.spec, self._widest, tokens)

    def vision(self, pixel_values: Floats) -> Floats:
        """Turn tiles f32 [n, 3, h, w] into features f32 [n * tokens_per_tile, H]."""
        vision = self._tower()
        groups = (pixel_values[i : i + TILES_AT_ONCE] for i in range(0, len(pixel_values), TILES_AT_ONCE))
        return np.concatenate([vision.run({"pixel_values": aligned(group)})[0] for group in groups])

    def vision_preempted(self, pixel_values: Floats, between: Between) -> Floats:
        """Turn one tile f32 [1, 3, h, w] into features f32 [M, H]: see `Preemptible.vision_preempted`."""
        with self._tower().left_for(between):
            return self.vision(pixel_values)

    def _tower(self) -> _Graph:
        """The graph of the vision tower, opened. Raises ArrieroError for a model without one."""
        if self.spec.vision is None:
            raise no_vision()
        tower = self._graphs["vision"]
        tower.open(POOLED)
        return tower

    def embed(self, input_ids: Ints, image_features: Floats) -> Floats:
        """Embed ids i64 [B, S], image placeholders taking `image_features` f32 [M, H] in order: f32 [B, S, H]."""
        feeds = {"input_ids": aligned(input_ids), "image_features": aligned(image_features)}
        return self._graphs["embed"].run(feeds)[0]

    def new_cache(self, batch: int, capacity: int) -> CacheRows[KVCache]:
        """Give an empty cache for `batch` rows of at most `capacity` tokens."""
        return CacheRows.whole(KVCache(self.spec, batch, capacity, self._graphs["text"].cache, at_once=True))

    def forward(
        self, inputs_embeds: Floats, positions: Ints, cache: Cache, logits_index: Ints, captures: bool = False
    ) -> StepOutput:
        """Run `inputs_embeds` [B, S, H]; see `Backend.forward`. The cache must come from `new_cache`."""
        batch, steps = positions.shape
        feeds = self._even_feeds(inputs_embeds, positions, cache, logits_index)
        step = self._output(feeds, captures)
        cache.lengths += steps
        return StepOutput(
            logits=step.logits.reshape(batch, len(logits_index), -1),
            expert_ids={number: ids.reshape(batch, steps, -1) for number, ids in step.expert_ids.items()},
            hiddens={number: hidden.reshape(batch, steps, -1) for number, hidden in step.hiddens.items()},
        )

    def forward_forced(
        self, inputs_embeds: Floats, positions: Ints, cache: Cache, logits_index: Ints, expert_ids: Mapping[int, Ints]
    ) -> Floats:
        """Run `inputs_embeds` [B, S, H], each token's experts given: see `ForcesRouting.forward_forced`."""
        batch, steps = positions.shape
        feeds = self._even_feeds(inputs_embeds, positions, cache, logits_index)
        forced = forced_inputs(self.spec, expert_ids, batch, steps)
        (logits,) = self._step(feeds | {name: aligned(ids) for name, ids in forced.items()})
        cache.lengths += steps
        return logits.reshape(batch, len(logits_index), -1)

    def forward_preempted(
        self, inputs_embeds: Floats, positions: Ints, cache: Cache, logits_index: Ints, between: Between
    ) -> Floats:
        """Run `inputs_embeds` [B, S, H] and call `between` in it: see `Preemptible.forward_preempted`."""
        assert isinstance(cache, CacheRows)
        assert isinstance(cache.store, KVCache)
        if not cache.store.has_all_slots:
            return self.forward(inputs_embeds, positions, cache, logits_index).logits
        before = cache.lengths.copy()
        try:
            with self._graphs["text"].left_between_parts(between):
                return self.forward(inputs_embeds, positions, cache, logits_index).logits
        except StepGivenUp:
            cache.lengths[:] = before
            raise

    def forward_packed(
        self, inputs_embeds: Floats, counts: Ints, cache: Cache, logits_index: Ints, captures: bool = False
    ) -> StepOutput:
        """Run `inputs_embeds` [T, H], of each row `counts` [B] tokens: see `PacksRows.forward_packed`."""
        step = self._output(self._feeds(inputs_embeds, counts, cache, logits_index), captures)
        cache.lengths += counts
        return step

    def _even_feeds(
        self, inputs_embeds: Floats, positions: Ints, cache: Cache, logits_index: Ints
    ) -> dict[str, np.ndarray]:
        """What the text graph takes for a step of S tokens of each row."""
        assert isinstance(cache, CacheRows)
        batch, steps = positions.shape
        check_step(positions, cache)
        index = (steps * np.arange(batch)[:, None] + logits_index).reshape(-1)
        return self._feeds(inputs_embeds.reshape(batch * steps, -1), np.full(batch, steps), cache, index)

    def _feeds(self, embeds: Floats, counts: Ints, cache: Cache, logits_index: Ints) -> dict[str, np.ndarray]:
        """What the text graph takes for a step of `embeds` [T, H] after `cache`, of each row `counts` tokens."""
        assert isinstance(cache, CacheRows)
        store = cache.store
        assert isinstance(store, KVCache)
        store.reserve(int((cache.lengths + counts).max()))
        starts = np.concatenate([[0], np.cumsum(counts)])
        positions = np.arange(len(embeds)) + np.repeat(cache.lengths - starts[:-1], counts)
        arguments = {
            "inputs_embeds": embeds[None],
            "positions": positions[None],
            "logits_index": logits_index,
            "row_starts": starts,
        }
        if ADAPTER in self._graphs["text"].inputs:
            arguments[ADAPTER] = cache.adapters
        feeds = self._unforced | {name: aligned(np.asarray(array)) for name, array in arguments.items()}
        for number in range(len(self.spec.layers)):
            for kind, buffer in zip(("key", "value"), store.layer(number, cache.start, cache.stop), strict=True):
                feeds[f"past_{kind}.{number}"] = buffer
        return feeds

    def _output(self, feeds: Mapping[str, np.ndarray], captures: bool) -> StepOutput:
        """What the text graph gives over `feeds`, all tokens as if of one row; without `captures` logits alone."""
        if not captures:
            (logits,) = self._step(feeds)
            return StepOutput(logits)
        named = dict(zip(self._graphs["text"].outputs, self._step(feeds, "main"), strict=True))
        layers = range(len(self.spec.layers))
        return StepOutput(
            logits=named["logits"],
            expert_ids={number: named[name] for number in layers if (name := f"expert_id.{number}") in named},
            hiddens={number: named[f"hidden.{number}"] for number in layers},
        )

    def close(self) -> None:
        """Drop the libraries and their memory."""
        if self._experts is not None:
            self._experts.close()
        self._graphs.clear()
        _empty_pool()

    def _step(self, feeds: Mapping[str, np.ndarray], function: str | None = None) -> list[np.ndarray]:
        """The outputs of `function` of the text graph; without one the logits alone, by that for so many tokens."""
        tokens = feeds["inputs_embeds"].shape[1]
        function = function or ("prompt" if tokens >= self._graphs["text"].many else "step")
        if self._memory is not None:
            logits = len(feeds["logits_index"])
            nbytes = pooled_bytes(self.spec, self._widest, tokens, logits, function == "main")
            self._memory.before((function, tokens, logits, len(feeds["row_starts"])), nbytes)
        try:
            return self._graphs["text"].run(feeds, function)
        except Exception:
            if self._experts is not None:
                self._experts.check_reads()
            raise


def _empty_pool() -> None:
    """Drop what steps no longer use and TVM keeps for the next ones, of whatever session."""
    load_runtime().get_global_func("vm.builtin.memory_manager.clear")()


def open_backend(bundle: Path, spec: ModelSpec, options: BackendOptions) -> TvmBackend:
    """Open the libraries in `bundle` for the model `spec`."""
    return TvmBackend(bundle, spec, options.threads, options.sha256, options.memory)


class _Graph:
    """One library and its signature; `bind` gives it weights as they lie in the bundle then, `open` loads it."""

    def __init__(self, bundle: Path, part: str, threads: int, sha256: Mapping[str, str]) -> None:
        self._ffi, self._path, self._threads = load_runtime(), bundle / f"{part}.so", threads
        with self._refusal():
            signature = json.loads((bundle / f"{part}.json").read_text())
            self._code = PrivateLibrary(self._path, sha256.get(self._path.name))
            self.inputs, self.outputs = signature["inputs"], signature["outputs"]
            self.weights, self.experts = signature["weights"], signature["experts"]
            self.packs: bool = signature["packs"]
            # the tokens from which on `prompt` is there for a step; bundles from before it do not say it
            self.many: float = signature.get("many") or math.inf
            # of keys and values; bundles from before they could be narrower do not say it
            self.cache = np.dtype(signature.get("cache") or "float32")
        self.library: Any = None
        self._machine: Machine | None = None
        # a second one, for a step while one of the first is left: a machine can run but one
        self._meanwhile: Machine | None = None

    def sizes(self) -> list[RecordSize]:
        """The layers' experts."""
        return [RecordSize(len(entry["records"]), entry["bytes"]) for entry in self.experts]

    def bind(self, weights: WeightFiles) -> None:
        """Take the weights, and the tables of experts."""
        with self._refusal():
            self._weights = weights  # the tables hold addresses of its memory
            self.tables = [weights.table(entry) for entry in self.experts]
            self._arrays = [weights.weight(entry) for entry in self.weights]

    def open(self, allocator: int) -> None:
        """Load the library and hand it its weights, unless that is done."""
        if self._machine is not None:
            return
        ffi = self._ffi
        with self._refusal():
            # TVM's own `load_module` would keep it for as long as the process runs
            load = ffi.get_global_func("ffi.Module.load_from_file.so")
            self.library = self._code.open(lambda path: load(path, "so"))
            machine = self._new_machine(allocator)
        self._parts = ffi.from_dlpack(np.zeros(self._threads, np.uint8))
        self._operands = [ffi.from_dlpack(array) for array in (*self.tables, *self._arrays)]
        self._machine = machine

    def _new_machine(self, allocator: int) -> Machine:
        machine = self.library["vm_load_executable"]()
        machine["vm_initialization"](*CPU, allocator)
        return functools.cache(machine.__getitem__)  # which makes a new object of a function whenever it is asked

    def run(self, feeds: Mapping[str, np.ndarray], function: str = "main") -> list[np.ndarray]:
        """Give the outputs of `function` over `feeds` (by input name), in order."""
        ffi = self._ffi
        use_threads(self._threads)
        arguments = [self._parts if name == "threads" else ffi.from_dlpack(feeds[name]) for name in self.inputs]
        assert self._machine is not None
        results = self._machine(function)(*arguments, *self._operands)
        return [np.from_dlpack(item) for item in (results if isinstance(results, ffi.Array) else [results])]

    @contextmanager
    def left_between_parts(self, between: Between) -> Iterator[None]:
        """Have a step in the block call `between` between its parts; the steps that it takes call nothing."""
        if self._meanwhile is None:
            self._meanwhile = self._new_machine(POOLED)

        def leave() -> float | None:
            self._machine, self._meanwhile = self._meanwhile, self._machine
            try:
                return between()
            finally:
                self._machine, self._meanwhile = self._meanwhile, self._machine

        with self.left_for(leave):
            yield

    @contextmanager
    def left_for(self, between: Between) -> Iterator[None]:
        """Have the library call `between` between parts of its steps in the block; those from before may not do so.

        Raises StepGivenUp behind a step that computed nothing more because `between` gave less than 0. The library does
        not fail there: of an error TVM's runtime would read all symbols of the process.
        """
        if not self.library.implements_function(BETWEEN_PARTS, True):
            yield
            return
        tell = self.library.get_function(BETWEEN_PARTS, True)
        seconds = 0.0

        def call() -> float:
            nonlocal seconds
            seconds = between() or 0.0
            return seconds

        function = ctypes.CFUNCTYPE(ctypes.c_double)(call)
        tell(ctypes.cast(function, ctypes.c_void_p).value)
        try:
            yield
        finally:
            tell(0)
        if seconds < 0:
            raise StepGivenUp

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
    """The module `tvm_ffi` with TVM's runtime library loaded.

    Raises MachineLacks with the package that is missing or does not load.
    """
    package = find_spec("tvm")
    if package is None or find_spec("tvm_ffi") is None:
        missing = "apache-tvm" if package is None else "apache-tvm-ffi"
        raise MachineLacks(f"the package {missing} is not installed", remedy=f"Install it with `{install('tvm')}`")
    # The pool would otherwise pin its threads to cores, which on an edge device are the app's cores too.
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    # And on x86 it would use every second core only, taking the others for hyper-threads.
    os.environ.setdefault("TVM_NUM_THREADS", str(usable_cores()))
    # Between a step's operators workers look for the next task rather than sleep, but not for the 300,000 looks of
    # TVM's own choice: a fifth of a second of every core after every answer, minutes where others compute, and as long
    # until the threads of a session that is closed have ended.
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "1000")
    with naming_broken_packages(), _unseen("torch"):
        import tvm_ffi

    if tvm_ffi.get_global_func("runtime.config_threadpool", allow_missing=True) is None:
        folders = [Path(place) / "lib" for place in package.submodule_search_locations or ()]
        try:
            tvm_ffi.libinfo.load_lib_ctypes("tvm", "tvm_runtime", "RTLD_GLOBAL", extra_lib_paths=folders)
        except Exception as error:  # what it raises is no part of its interface
            raise does_not_load("tvm", error) from error
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
