"""The ONNX Runtime backend: text, vision and embedding graphs of a bundle, with key/value buffers updated in place.

Shapes: B batch rows, S new tokens per row, H hidden, K key/value heads, D head dimension, L slots that get logits,
k experts per token, M image placeholder tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from arriero.errors import ArrieroError
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
from arriero.runtimes.cache import KVCache, check_step, valid_slots
from arriero.runtimes.cache_rows import CacheRows
from arriero.runtimes.cpu import usable_cores
from arriero.runtimes.forced_routing import forced_inputs, takes_routing
from arriero.runtimes.load_onnxruntime import load_onnxruntime
from arriero.runtimes.unchanged import Unchanged
from arriero.traits import PREFILL_PIECE

if TYPE_CHECKING:
    import onnxruntime

CACHE_TYPES = {"tensor(float)": np.float32, "tensor(int8)": np.int8}


class OrtBackend:
    """The three graphs of a bundle directory on ONNX Runtime's CPU provider."""

    literal = False  # see `session_options`
    piece, few_rows = PREFILL_PIECE, 0

    def __init__(self, bundle: Path, spec: ModelSpec, threads: int | None = None) -> None:
        """Open the graphs in `bundle` for the model `spec`; `threads` None means every core we may use."""
        self.spec = spec
        self.threads = threads or usable_cores()
        self._bundle = bundle
        self._text = self._open("text.onnx")
        self._embed = self._open("embed.onnx")
        # a text-only model's graph has no input for image features
        self._embed_inputs = [entry.name for entry in self._embed.get_inputs()]
        self._vision: onnxruntime.InferenceSession | None = None
        self._files = Unchanged(bundle)
        self._check_signature()

    def _open(self, name: str) -> onnxruntime.InferenceSession:
        return open_graph(self._bundle / name, self.threads, self.literal)

    def _check_signature(self) -> None:
        layers = range(len(self.spec.layers))
        caches = [f"past_{kind}.{i}" for i in layers for kind in ("key", "value")]
        needs = {"inputs_embeds", "positions", "logits_index", *caches}
        for attention in {layer.attention for layer in self.spec.layers}:
            name = _prefix(attention)
            needs |= {f"{name}_seqlens_k", f"{name}_total"}
        has = {entry.name for entry in self._text.get_inputs()}
        # the other class's counters may stand in the signature unused, so only what is missing or unknown is refused
        unknown = (
            has
            - needs
            - {ADAPTER}
            - {f"{name}_{kind}" for name in ("chunk", "global") for kind in ("seqlens_k", "total")}
        )
        if needs - has or unknown:
            raise ArrieroError(
                f"the graph's inputs do not fit the manifest's model (missing {sorted(needs - has)[:4]}, "
                f"unknown {sorted(unknown)[:4]})",
                where=str(self._bundle / "text.onnx"),
                remedy="The bundle mixes files of two builds: rebuild it with `arriero build`",
            )
        types = {entry.type for entry in self._text.get_inputs() if entry.name in caches}
        if len(types) != 1 or not types <= CACHE_TYPES.keys():
            raise ArrieroError(
                f"the graph keeps keys and values as {', '.join(sorted(types))}",
                where=str(self._bundle / "text.onnx"),
                expected=f"one of {', '.join(CACHE_TYPES)} for all layers",
                remedy="Use the arriero that built the bundle, or rebuild it with `arriero build`",
            )
        self._cache_type = CACHE_TYPES[types.pop()]
        self._has_adapters = ADAPTER in has
        optional = [entry.name for entry in self._text.get_overridable_initializers()]
        self.forces_routing = takes_routing(self.spec, optional)
        self._counters = [name for name in ("chunk", "global") if f"{name}_total" in has]

    def vision(self, pixel_values: Floats) -> Floats:
        """Turn tiles f32 [n, 3, h, w] into features f32 [n * tokens_per_tile, H]."""
        if self.spec.vision is None:
            raise no_vision()
        if self._vision is None:
            # opened on the first image: a text-only app never pays for the tower's memory
            vision = self._open("vision.onnx")
            self._files.check()  # afterwards, so that nothing can come in between
            self._vision = vision
        groups = range(0, len(pixel_values), TILES_AT_ONCE)
        parts = [
            self._vision.run(["image_features"], {"pixel_values": pixel_values[i : i + TILES_AT_ONCE]})[0]
            for i in groups
        ]
        return np.concatenate(parts)

    def embed(self, input_ids: Ints, image_features: Floats) -> Floats:
        """Embed ids i64 [B, S], image placeholders taking `image_features` f32 [M, H] in order: f32 [B, S, H]."""
        feeds = {"input_ids": input_ids, "image_features": image_features}
        embeds = self._embed.run(["inputs_embeds"], {name: feeds[name] for name in self._embed_inputs})[0]
        return np.asarray(embeds)

    def new_cache(self, batch: int, capacity: int) -> CacheRows[KVCache]:
        """Give an empty cache for `batch` rows of at most `capacity` tokens."""
        return CacheRows.whole(KVCache(self.spec, batch, capacity, self._cache_type))

    def forward(
        self, inputs_embeds: Floats, positions: Ints, cache: Cache, logits_index: Ints, captures: bool = False
    ) -> StepOutput:
        """Run `inputs_embeds` [B, S, H]; see `Backend.forward`. The cache must come from `new_cache`."""
        return self._step(inputs_embeds, positions, cache, logits_index, {}, captures)

    def forward_forced(
        self, inputs_embeds: Floats, positions: Ints, cache: Cache, logits_index: Ints, expert_ids: Mapping[int, Ints]
    ) -> Floats:
        """The same with each token's experts given: see `ForcesRouting.forward_forced`."""
        forced = forced_inputs(self.spec, expert_ids, *positions.shape)
        return self._step(inputs_embeds, positions, cache, logits_index, forced, captures=False).logits

    def _step(
        self,
        inputs_embeds: Floats,
        positions: Ints,
        cache: Cache,
        logits_index: Ints,
        forced: Mapping[str, Ints],
        captures: bool,
    ) -> StepOutput:
        onnxruntime = load_onnxruntime()
        assert isinstance(cache, CacheRows)
        store = cache.store
        assert isinstance(store, KVCache)
        batch, steps, _ = inputs_embeds.shape
        check_step(positions, cache)
        store.reserve(int(cache.lengths.max()) + steps)
        tensor = onnxruntime.OrtValue.ortvalue_from_numpy
        feeds = {"inputs_embeds": inputs_embeds, "positions": positions, "logits_index": logits_index, **forced}
        if self._has_adapters:
            feeds[ADAPTER] = cache.adapters
        for name in self._counters:
            attention = "chunked" if name == "chunk" else "global"
            held = valid_slots(cache.lengths, attention, self.spec.attention_chunk_size) + steps
            feeds[f"{name}_seqlens_k"] = (held - 1).astype(np.int32)
            feeds[f"{name}_total"] = held.max(keepdims=True).astype(np.int32)
        binding = self._text.io_binding()
        # `kept` holds every array and OrtValue until the run is over: a bound CPU tensor borrows numpy's memory
        kept = [tensor(np.ascontiguousarray(array)) for array in feeds.values()]
        for name, value in zip(feeds, kept, strict=True):
            binding.bind_ortvalue_input(name, value)
        outputs = ["logits", *(self._tap_names() if captures else ())]
        for name in outputs:
            binding.bind_output(name)
        for number in range(len(self.spec.layers)):
            for kind, buffer in zip(("key", "value"), store.layer(number, cache.start, cache.stop), strict=True):
                value = tensor(buffer)
                kept.append(value)
                binding.bind_ortvalue_input(f"past_{kind}.{number}", value)
                # present is past's own memory: the step writes its S slots and copies nothing
                binding.bind_ortvalue_output(f"present_{kind}.{number}", value)
        self._text.run_with_iobinding(binding)
        cache.lengths += steps
        results = binding.get_outputs()[: len(outputs)]
        named = dict(zip(outputs, (result.numpy() for result in results), strict=True))
        return StepOutput(
            logits=named["logits"],
            expert_ids={
                number: named[name].reshape(batch, steps, -1)
                for number in range(len(self.spec.layers))
                if (name := f"expert_id.{number}") in named
            },
            hiddens={
                number: named[name] for number in range(len(self.spec.layers)) if (name := f"hidden.{number}") in named
            },
        )

    def _tap_names(self) -> Iterable[str]:
        has = {entry.name for entry in self._text.get_outputs()}
        for number in range(len(self.spec.layers)):
            yield from (name for name in (f"hidden.{number}", f"expert_id.{number}") if name in has)

    def close(self) -> None:
        """Drop the graphs and their memory."""
        del self._text, self._embed
        self._vision = None


def open_backend(bundle: Path, spec: ModelSpec, options: BackendOptions) -> OrtBackend:
    """Open the graphs in `bundle` for the model `spec`."""
    return OrtBackend(bundle, spec, options.threads)


def _prefix(attention: str) -> str:
    return "chunk" if attention == "chunked" else "global"


def session_options(threads: int, literal: bool = False) -> onnxruntime.SessionOptions:
    """The options with which a graph is run; `literal` computes QuantizeLinear and DequantizeLinear as written.

    Otherwise ONNX Runtime may fuse them with a product into one of u8 by s8, whose 16-bit sums saturate on x86-64
    processors without VNNI. Our own graphs hold none (see `linear_functions`); those for NVIDIA's GPUs do. Its option
    for exact sums there, session.x64quantprecision, breaks a DequantizeLinear that has a scale per row and no zero
    point, as in those graphs.
    """
    options: onnxruntime.SessionOptions = load_onnxruntime().SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # A spinning pool keeps its cores busy while it waits. On an edge device those are the app's cores too, and beside
    # other work a step with two spinning threads was measured several times slower than with sleeping ones.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if literal:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


def open_graph(path: Path, threads: int, literal: bool = False) -> onnxruntime.InferenceSession:
    """Load a graph with `session_options`. Raises ArrieroError with ONNX Runtime's reason where it refuses."""
    onnxruntime = load_onnxruntime()
    try:
        return onnxruntime.InferenceSession(path, session_options(threads, literal), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ArrieroError(
            f"ONNX Runtime {onnxruntime.__version__} refuses the graph: {str(error).splitlines()[0]}",
            where=str(path),
            remedy="Rebuild the bundle with `arriero build`, or install the ONNX Runtime its manifest names",
        ) from error
