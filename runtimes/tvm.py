"""The TVM backend: text, vision and embedding libraries of a bundle, with key/value buffers updated in place.

Needs the packages `apache-tvm-ffi` and, of `apache-tvm`, the runtime library alone: no compiler is loaded. Weights are
handed to the libraries where they lie, in memory-mapped files; what no step touches is never read from disk. Under a
cap on memory those that every token reads are read once, and experts come and go in a cache of the library's own; the
embedding's table stays mapped.
Shapes: B batch rows, S new tokens per row, T new tokens of all rows, H hidden, V vocabulary, K key/value heads, D head
dimension, L slots that get logits, k experts per token, M image placeholder tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

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
from arriero.runtimes.cache import KVCache, check_step
from arriero.runtimes.cache_rows import CacheRows
from arriero.runtimes.cpu import usable_cores
from arriero.runtimes.expert_cache import ExpertCache
from arriero.runtimes.forced_routing import PREFIX, forced_inputs, takes_routing
from arriero.runtimes.memory import anonymous_memory
from arriero.runtimes.memory_cap import MemoryShare, pooled_bytes, share_memory, step_bytes
from arriero.runtimes.step_memory import StepMemory
from arriero.runtimes.tvm_graph import BETWEEN_PARTS, NAIVE, POOLED, CompiledGraph, Feeds, load_runtime
from arriero.runtimes.weight_files import MappedWeights, ReadWeights, WeightFiles, aligned, entry_bytes
from arriero.traits import PREFILL_PIECE

PANEL = 16  # output features in each row of a packed matrix
KNOWN_ROWS = 8  # of one cache, for which arguments are kept


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
        self._graphs = {part: CompiledGraph(bundle, part, self.threads, sha256 or {}) for part in parts}
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
        if memory is None:  # threads that look would be in the way of what reads experts
            text.keep_crew()
        # a cap has room for one step, and bundles from before lack the function
        self.preemptible = memory is None and text.library.implements_function(BETWEEN_PARTS, True)
        unforced = aligned(np.empty((0, spec.num_experts_per_tok), np.int64))
        self._unforced = text.as_arguments({name: unforced for name in text.inputs if name.startswith(PREFIX)})
        self._no_pictures = aligned(np.empty((0, spec.hidden_size), np.float32))
        # of a cache the rows that were stepped last: a token waits for every array that is handed over anew
        self._known_rows = weakref.WeakKeyDictionary[KVCache, dict[tuple[int, int], Mapping[str, Any]]]()
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

    def _tower(self) -> CompiledGraph:
        """The graph of the vision tower, opened. Raises ArrieroError for a model without one."""
        if self.spec.vision is None:
            raise no_vision()
        tower = self._graphs["vision"]
        tower.open(POOLED)
        return tower

    def embed(self, input_ids: Ints, image_features: Floats) -> Floats:
        """Embed ids i64 [B, S], image placeholders taking `image_features` f32 [M, H] in order: f32 [B, S, H]."""
        pictures = aligned(image_features) if len(image_features) else self._no_pictures
        return self._graphs["embed"].run({"input_ids": aligned(input_ids), "image_features": pictures})[0]

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
        # of the entries the one whose last layer has all tokens, as the ids are of all
        logits, *_ = self._step({**feeds, **{name: aligned(ids) for name, ids in forced.items()}}, "main")
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
        starts = np.concatenate([[0], np.cumsum(counts)])
        positions = np.arange(len(inputs_embeds)) + np.repeat(cache.lengths - starts[:-1], counts)
        step = self._output(self._feeds(inputs_embeds[None], starts, positions[None], cache, logits_index), captures)
        cache.lengths += counts
        return step

    def _even_feeds(self, inputs_embeds: Floats, positions: Ints, cache: Cache, logits_index: Ints) -> Feeds:
        """What the text graph takes for a step of S tokens of each row."""
        assert isinstance(cache, CacheRows)
        batch, steps = positions.shape
        check_step(positions, cache)
        starts = np.arange(0, batch * steps + 1, steps)
        index = (starts[:-1, None] + logits_index).reshape(-1)
        return self._feeds(inputs_embeds.reshape(1, batch * steps, -1), starts, positions.reshape(1, -1), cache, index)

    def _feeds(self, embeds: Floats, starts: Ints, positions: Ints, cache: Cache, logits_index: Ints) -> Feeds:
        """What the text graph takes for a step of `embeds` [1, T, H] at `positions` [1, T] after `cache`.

        Each row's tokens begin where `starts` [B + 1] says.
        """
        assert isinstance(cache, CacheRows)
        store = cache.store
        assert isinstance(store, KVCache)
        store.reserve(1 + int(positions.max()))
        arguments = {
            "inputs_embeds": embeds,
            "positions": positions,
            "logits_index": logits_index,
            "row_starts": starts,
        }
        if ADAPTER in self._graphs["text"].inputs:
            arguments[ADAPTER] = cache.adapters
        feeds = {name: aligned(np.asarray(array)) for name, array in arguments.items()}
        return {**self._unforced, **self._past(store, cache.start, cache.stop), **feeds}

    def _past(self, store: KVCache, start: int, stop: int) -> Mapping[str, Any]:
        """The keys and values of rows as the text graph takes them; the same object for rows that are stepped again."""
        known = self._known_rows.setdefault(store, {})
        if (start, stop) not in known or not store.has_all_slots:
            if len(known) == KNOWN_ROWS:
                known.clear()
            buffers = {
                f"past_{kind}.{number}": buffer
                for number in range(len(self.spec.layers))
                for kind, buffer in zip(("key", "value"), store.layer(number, start, stop), strict=True)
            }
            known[start, stop] = self._graphs["text"].as_arguments(buffers)
        return known[start, stop]

    def _output(self, feeds: Feeds, captures: bool) -> StepOutput:
        """What the text graph gives over `feeds`, all tokens as if of one row; without `captures` logits alone."""
        if not captures:
            alone = feeds["inputs_embeds"].shape[1] == 1 and len(feeds["row_starts"]) == 2
            return StepOutput(self._logits(feeds, self._graphs["text"].for_a_token if alone else "step"))
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

    def _logits(self, feeds: Feeds, few: str = "step") -> np.ndarray:
        """What the text graph gives by that of its functions for so many tokens; `few` is the one for a few."""
        function = "prompt" if feeds["inputs_embeds"].shape[1] >= self._graphs["text"].many else few
        (logits,) = self._step(feeds, function)
        return logits

    def _step(self, feeds: Feeds, function: str) -> list[np.ndarray]:
        """The outputs of `function` of the text graph."""
        tokens = feeds["inputs_embeds"].shape[1]
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
