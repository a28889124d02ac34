"""The TensorRT backend: text, vision and embedding engines of a bundle on one GPU, keys and values in its memory.

Needs TensorRT's Python package and that of CUDA's bindings. `tensorrt-rtx` is the same over another product.
Shapes: B batch rows, S new tokens per row, H hidden, K key/value heads, P slots of a buffer, D head dimension, L slots
that get logits, k experts per token, M image placeholder tokens, n image tiles.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from arriero.errors import ArrieroError
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
from arriero.runtimes.cache import check_step
from arriero.runtimes.cache_rows import CacheRows
from arriero.runtimes.manifest import Manifest
from arriero.runtimes.nvidia.cuda import Device, load_cuda
from arriero.runtimes.nvidia.device_cache import DeviceCache, SlotLimits
from arriero.runtimes.nvidia.engine import Engine
from arriero.runtimes.nvidia.engine_signature import REBUILD
from arriero.runtimes.nvidia.products import Product, check_product
from arriero.runtimes.unchanged import Unchanged
from arriero.traits import PREFILL_PIECE

PRODUCT = Product()
KINDS = ("key", "value")


class TensorRtBackend:
    """The engines of a bundle directory on the first GPU that this process may use."""

    piece, few_rows = PREFILL_PIECE, 0

    def __init__(self, bundle: Path, spec: ModelSpec, product: Product = PRODUCT) -> None:
        """Load the engines in `bundle` for the model `spec`.

        Raises MachineLacks without GPU, driver, library or room, ArrieroError for a bundle that does not fit.
        """
        self.spec, self._bundle, self._product = spec, bundle, product
        self._trt = product.load()
        self.device = Device(load_cuda(product.extra))
        self._engines: dict[str, Engine] = {}
        self._files = Unchanged(bundle)
        try:
            self._cache_stream = self.device.stream()
            self._text, self._embed = self._open("text"), self._open("embed")
            self._check_text()
        except BaseException:
            self.close()
            raise

    def _open(self, part: str) -> Engine:
        engine = self._engines[part] = Engine(self._bundle, part, self._product, self._trt, self.device)
        return engine

    def _check_text(self) -> None:
        signature, layers = self._text.signature, range(len(self.spec.layers))
        pasts, presents = ([f"{time}_{kind}.{i}" for i in layers for kind in KINDS] for time in ("past", "present"))
        odd = signature.inputs.keys() ^ {"inputs_embeds", "positions", "logits_index", *pasts}
        odd |= {"logits", *presents, *(f"hidden.{i}" for i in layers)} - signature.outputs.keys()
        if odd:
            raise ArrieroError(
                f"the engine's inputs and outputs do not fit the manifest's model ({', '.join(sorted(odd)[:4])})",
                where=signature.where,
                remedy=f"The bundle mixes files of two builds. {REBUILD}",
            )
        self._cache_type = signature.inputs[pasts[0]].numpy
        self._slots = {}
        for attention in ("chunked", "global"):
            ends = [
                signature.limits(f"past_key.{i}", 2)
                for i, layer in enumerate(self.spec.layers)
                if layer.attention == attention
            ]
            self._slots[attention] = SlotLimits(
                max((a for a, _ in ends), default=0), min((b for _, b in ends), default=0)
            )

    def vision(self, pixel_values: Floats) -> Floats:
        """Turn tiles f32 [n, 3, h, w] into features f32 [n * tokens_per_tile, H]."""
        if self.spec.vision is None:
            raise no_vision()
        if "vision" not in self._engines:
            # loaded on the first image: a text-only app never pays for the tower's memory
            self._files.check()
            self._open("vision")
        engine = self._engines["vision"]
        most = max(min(TILES_AT_ONCE, engine.signature.most("pixel_values", 0)), 1)
        groups = (pixel_values[i : i + most] for i in range(0, len(pixel_values), most))
        return np.concatenate(
            [engine.run({"pixel_values": group}, ("image_features",))["image_features"] for group in groups]
        )

    def embed(self, input_ids: Ints, image_features: Floats) -> Floats:
        """Embed ids i64 [B, S], image placeholders taking `image_features` f32 [M, H] in order: f32 [B, S, H]."""
        rows, tokens = (self._embed.signature.most("input_ids", axis) for axis in (0, 1))
        pieces = [input_ids]
        if len(input_ids) > rows or input_ids.shape[1] > tokens:
            # more than a step of the text decoder may have; tokens are embedded one by one, so pieces give the same
            flat = input_ids.reshape(1, -1)
            pieces = [flat[:, start : start + tokens] for start in range(0, flat.shape[1], tokens)]
        embeds, used = [], 0
        for piece in pieces:
            placeholders = int(np.sum(piece == self.spec.image_token_id))
            embeds.append(self._embed_piece(piece, image_features[used : used + placeholders]))
            used += placeholders
        return np.concatenate(embeds, axis=1).reshape(*input_ids.shape, -1)

    def _embed_piece(self, input_ids: Ints, image_features: Floats) -> Floats:
        arguments: dict[str, np.ndarray] = {"input_ids": input_ids, "image_features": image_features}
        # a text-only model's engine has no input for image features
        feeds = {name: arguments[name] for name in self._embed.signature.inputs}
        return self._embed.run(feeds, ("inputs_embeds",))["inputs_embeds"]

    def new_cache(self, batch: int, capacity: int) -> CacheRows[DeviceCache]:
        """Give an empty cache for `batch` rows of at most `capacity` tokens, in the GPU's memory."""
        classes = {layer.attention for layer in self.spec.layers}
        slots = {"chunked": min(self.spec.attention_chunk_size, capacity), "global": capacity}
        rows = self._text.signature.most("past_key.0", 0)
        for attention in classes:
            most = self._slots[attention].most
            if slots[attention] > most or batch > rows:
                raise ArrieroError(
                    f"a cache of {batch} rows with {slots[attention]} slots in {attention} layers is too large",
                    where=self._text.signature.where,
                    expected=f"at most {rows} rows and {most} slots, as the engine was built for",
                    remedy="Build the target with a larger `batch` or `context`",
                )
        return CacheRows.whole(
            DeviceCache(self._cache_stream, self.spec, batch, capacity, self._cache_type, self._slots)
        )

    def forward(
        self, inputs_embeds: Floats, positions: Ints, cache: Cache, logits_index: Ints, captures: bool = False
    ) -> StepOutput:
        """Run `inputs_embeds` [B, S, H]; see `Backend.forward`. The cache must come from `new_cache`."""
        assert isinstance(cache, CacheRows)
        store = cache.store
        assert isinstance(store, DeviceCache)
        batch, steps = positions.shape
        check_step(positions, cache)
        store.reserve(int(cache.lengths.max()) + steps)
        layers = range(len(self.spec.layers)) if captures else ()
        ids = {i: f"expert_id.{i}" for i in layers if f"expert_id.{i}" in self._text.signature.outputs}
        hiddens = {i: f"hidden.{i}" for i in layers}
        feeds: dict[str, np.ndarray] = {
            "inputs_embeds": inputs_embeds,
            "positions": positions,
            "logits_index": logits_index,
        }
        outputs = ("logits", *ids.values(), *hiddens.values())
        named = self._text.run(feeds, outputs, store.bindings(cache.start, cache.stop), record=not captures)
        cache.lengths += steps
        return StepOutput(
            logits=named["logits"],
            expert_ids={number: named[name].reshape(batch, steps, -1) for number, name in ids.items()},
            hiddens={number: named[name] for number, name in hiddens.items()},
        )

    def close(self) -> None:
        """Give back engines, contexts and all memory of the GPU, that of caches included."""
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()
        self.device.close()


def open_backend(bundle: Path, spec: ModelSpec, options: BackendOptions) -> TensorRtBackend:
    """Load the engines in `bundle` for the model `spec`; the GPU has its own threads, so `options` changes nothing."""
    return TensorRtBackend(bundle, spec)


def check_machine(manifest: Manifest) -> None:
    """Refuse a bundle whose engines this machine cannot load, before any is. Raises MachineLacks with the remedy."""
    check_product(manifest, PRODUCT)
