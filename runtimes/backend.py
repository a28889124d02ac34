"""What a session asks of a backend: methods over numpy arrays, and the model facts they share.

Shapes: B batch rows, S new tokens per row, H hidden, V vocabulary, L slots that get logits, k experts per token,
M image placeholder tokens, n image tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from numbers import Integral
from typing import Any, Literal, Protocol, Self, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from arriero.errors import ArrieroError
from arriero.runtimes.snapshot import Snapshot
from arriero.traits import MOST_THREADS

# A vision tower's activations are per tile, so tiles go through in groups and peak memory does not grow with them.
TILES_AT_ONCE = 4
ADAPTER = "adapter"  # the input i64 [B] of a text graph that has adapters to choose from

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
# What comes between parts of a step; gives the seconds in which it need not be called again, None for 0. With less than
# 0 the step is given up.
Between = Callable[[], float | None]
GIVE_UP = -1.0


class StepGivenUp(Exception):
    """What came between parts of a step wanted no more of it; its row of the cache holds a part of what was read."""


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer: which keys it may see, and what follows its attention."""

    attention: Literal["chunked", "global"]
    ffn: Literal["moe", "dense"]


@dataclass(frozen=True)
class VisionSpec:
    """The vision tower's square input, its patches, and the text tokens that one tile becomes."""

    image_size: int
    patch_size: int
    tokens_per_tile: int


@dataclass(frozen=True)
class ModelSpec:
    """The facts of one model that a runtime needs, as the manifest's `model` entry states them."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_local_experts: int
    num_experts_per_tok: int
    attention_chunk_size: int
    max_position_embeddings: int
    layers: tuple[LayerSpec, ...]
    vision: VisionSpec | None
    image_token_id: int | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @classmethod
    def parse(cls, model: Mapping[str, Any], where: str = "manifest.json:model") -> Self:
        """Read a manifest's `model` entry; a missing or misshapen key is an `ArrieroError` that names it."""
        try:
            text = model["text"]
            layers = tuple(_layer(entry, f"{where}.text.layers[{i}]") for i, entry in enumerate(text["layers"]))
            vision, image_token, bos = model["vision"], model["image_token_id"], model["bos_token_id"]
            spec = cls(
                model_type=str(model["model_type"]),
                vocab_size=int(text["vocab_size"]),
                hidden_size=int(text["hidden_size"]),
                num_attention_heads=int(text["num_attention_heads"]),
                num_key_value_heads=int(text["num_key_value_heads"]),
                head_dim=int(text["head_dim"]),
                num_local_experts=int(text["num_local_experts"]),
                num_experts_per_tok=int(text["num_experts_per_tok"]),
                attention_chunk_size=int(text["attention_chunk_size"]),
                max_position_embeddings=int(text["max_position_embeddings"]),
                layers=layers,
                vision=None
                if vision is None
                else VisionSpec(int(vision["image_size"]), int(vision["patch_size"]), int(vision["tokens_per_tile"])),
                image_token_id=None if image_token is None else int(image_token),
                bos_token_id=None if bos is None else int(bos),
                eos_token_ids=tuple(int(token) for token in model["eos_token_ids"]),
            )
        except KeyError as missing:
            raise ArrieroError(f"the key {missing} is missing", where=where, remedy=_REBUILD) from None
        except (TypeError, ValueError) as error:
            raise ArrieroError(f"an entry has the wrong shape ({error})", where=where, remedy=_REBUILD) from None
        if len(layers) != int(text.get("num_hidden_layers", len(layers))):
            raise ArrieroError(
                f"{len(layers)} layers are listed",
                where=f"{where}.text.layers",
                expected=f"{text['num_hidden_layers']} as num_hidden_layers says",
                remedy=_REBUILD,
            )
        return spec

    def entry(self) -> dict[str, Any]:
        """Give the manifest's `model` entry, the inverse of `parse`."""
        whole = asdict(self)
        outside = ("model_type", "vision", "image_token_id", "bos_token_id", "eos_token_ids")
        text = {key: value for key, value in whole.items() if key not in outside}
        return {key: whole[key] for key in outside} | {"text": {"num_hidden_layers": len(self.layers), **text}}


_REBUILD = "Rebuild the bundle with `arriero build`"


def _layer(entry: Mapping[str, str], where: str) -> LayerSpec:
    attention, ffn = entry["attention"], entry["ffn"]
    if attention not in ("chunked", "global") or ffn not in ("moe", "dense"):
        raise ArrieroError(
            f"attention {attention!r} with ffn {ffn!r} is unknown",
            where=where,
            expected="attention chunked or global, ffn moe or dense",
            remedy="The bundle was made for another version of arriero: rebuild it or upgrade",
        )
    return LayerSpec(cast(Literal["chunked", "global"], attention), cast(Literal["moe", "dense"], ffn))


@dataclass(frozen=True)
class StepOutput:
    """What one forward gives; the two dictionaries are by layer number, empty unless captures were asked for."""

    logits: Floats  # [B, L, V]
    expert_ids: dict[int, Ints] = field(default_factory=dict)  # MoE layers: [B, S, k]
    hiddens: dict[int, Floats] = field(default_factory=dict)  # residual stream after the layer: [B, S, H]


def no_vision() -> ArrieroError:
    """What a backend raises for an image where the bundle is text-only."""
    return ArrieroError(
        "this bundle has no vision tower, so it cannot read images", remedy="Build it with `modalities: [text, image]`"
    )


@dataclass(frozen=True)
class MemoryCap:
    """The bytes that a session may take of the memory, with `batch` sequences of `context` tokens in its caches."""

    nbytes: int
    context: int
    batch: int


@dataclass(frozen=True)
class LayerReads:
    """How a layer's cache of experts did: what a step needed and found, what it read, how often and long it waited.

    `seconds` are those in which at least one read was under way, `waited` those that a step had nothing else to do.
    """

    layer: int
    experts: int
    slots: int
    hits: int
    misses: int
    bytes: int
    seconds: float
    waits: int
    waited: float

    @property
    def hit_rate(self) -> float | None:
        """The share of needed experts that were in memory; None where none was needed yet."""
        needed = self.hits + self.misses
        return self.hits / needed if needed else None


@dataclass(frozen=True)
class CacheStatistics:
    """The layers' caches of experts; `buffered` says why reads go through the system's cache, if they do."""

    layers: tuple[LayerReads, ...] = ()
    buffered: str | None = None


@dataclass(frozen=True)
class BackendOptions:
    """How a backend is to use this machine, and what it may run there.

    `threads` None means every core that this process may use. `sha256` are the hashes, by name, that files of code must
    have when they are opened; empty where no manifest says them. `memory` None leaves what of the weights is in memory
    to the system.
    """

    threads: int | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)
    memory: MemoryCap | None = None

    def __post_init__(self) -> None:
        whole = isinstance(self.threads, Integral) and not isinstance(self.threads, bool)
        if self.threads is not None and not (whole and 1 <= self.threads <= MOST_THREADS):
            raise ArrieroError(f"threads is {self.threads!r}", expected=f"a whole number from 1 to {MOST_THREADS:,}")


class Cache(Protocol):
    """The keys and values of B rows; a backend's `forward` extends it in place."""

    lengths: Ints  # [B] tokens held per row, which is also the position of the row's next token
    adapters: Ints  # [B] number of the adapter that a row is read with, 0 for none; set before its first token

    @property
    def capacity(self) -> int:
        """Most tokens a row may hold."""
        ...

    def rows(self, start: int, stop: int) -> Cache:
        """Rows `start` to `stop` as a cache of their own that shares this one's memory and lengths."""
        ...

    def reserve(self, tokens: int) -> None:
        """Make sure that rows of `tokens` tokens have slots; refuses more than `capacity`."""
        ...

    def copy_row(self, source: int, target: int) -> None:
        """Make row `target` equal to row `source`."""
        ...

    def truncate(self, row: int, length: int) -> None:
        """Keep the first `length` tokens of `row`: those of the current attention chunk, or a multiple of the chunk.

        Any other length is an `ArrieroError`: the chunked layers' slots are overwritten there, so that only a snapshot
        brings them back. Right at the chunk's edge the row's next chunk is the current one.
        """
        ...

    def snapshot(self, row: int, start: int = 0) -> Snapshot:
        """Copy what `row` holds of the tokens from `start` on; later steps change nothing of it."""
        ...

    def restore(self, row: int, snapshot: Snapshot) -> None:
        """Make `row` hold what `snapshot` was taken of, whatever it held before: decoding goes on bit for bit.

        The snapshot may come from any row of any cache of this backend's model; one that does not fit this cache's
        model, dtype or capacity is an `ArrieroError`.
        """
        ...


@runtime_checkable
class CapsMemory(Protocol):
    """What a backend has besides that can keep to a cap on its memory."""

    def statistics(self) -> CacheStatistics:
        """How the caches of experts did since the backend was opened; no layers where it has no cap."""
        ...


@runtime_checkable
class PacksRows(Protocol):
    """What a backend has besides that can take rows of different numbers of tokens in one step."""

    packs: bool  # whether the bits of a row are then those that it has alone, for these weights

    def forward_packed(
        self, inputs_embeds: Floats, counts: Ints, cache: Cache, logits_index: Ints, captures: bool = False
    ) -> StepOutput:
        """Run `inputs_embeds` [T, H] after `cache`, of each of its B rows `counts` [B] tokens, one row after another.

        Gives logits f32 [1, L, V] of the tokens `logits_index` [L] of T, and captures of all T, as if of one row. A row
        may have no token; all of a row's lie inside one attention chunk. The rows' `cache.lengths` grow by `counts`.
        """
        ...


@runtime_checkable
class Preemptible(Protocol):
    """What a backend has besides whose steps can be left between parts of layers, for steps of other rows."""

    preemptible: bool  # whether these weights' graph, as it was opened, can be

    def forward_preempted(
        self, inputs_embeds: Floats, positions: Ints, cache: Cache, logits_index: Ints, between: Between
    ) -> Floats:
        """Run a step as `Backend.forward` does, and call `between` between its parts, some milliseconds of work each.

        Gives logits f32 [B, L, V]. `between` is called before or after the part in which the seconds end that it gave
        last, whichever is nearer. It may take steps of other rows of the cache's store, which change no bit of this
        one, and must raise nothing. It is not called where a step of others would move the store's buffers. Raises
        StepGivenUp where `between` asks for it; the rows' `cache.lengths` are what they were then.
        """
        ...

    def vision_preempted(self, pixel_values: Floats, between: Between) -> Floats:
        """Turn one tile f32 [1, 3, h, w] into its features f32 [M, H] as `Backend.vision` does, bit for bit.

        `between`, which may take steps and must raise nothing, is called between parts where the tower can be left.
        Raises StepGivenUp where it asks for it.
        """
        ...


@runtime_checkable
class ForcesRouting(Protocol):
    """What a backend has besides that can send tokens to other experts than its routers choose."""

    forces_routing: bool  # whether the graph takes expert ids: those of older bundles and of dense models do not

    def forward_forced(
        self, inputs_embeds: Floats, positions: Ints, cache: Cache, logits_index: Ints, expert_ids: Mapping[int, Ints]
    ) -> Floats:
        """Run a step as `Backend.forward` does, each token sent to `expert_ids` [B, S, k] of every MoE layer.

        The score of an expert stays what the token's own router gives it; an id of -1 leaves the choice to the router.
        Gives logits f32 [B, L, V]. Raises ArrieroError for ids that the model does not have.
        """
        ...


class Backend(Protocol):
    """The model behind one set of weights. One thread at a time calls its methods; a session's `Engine` sees to it."""

    spec: ModelSpec
    piece: int  # tokens of a prompt that are read at once, where nobody waits for another step
    few_rows: int  # a row's bits are the same in every step of so many rows, and in every one of more; 0: in all

    def vision(self, pixel_values: Floats) -> Floats:
        """Turn tiles f32 [n, 3, h, w] into text-space features f32 [n * tokens_per_tile, H]."""
        ...

    def embed(self, input_ids: Ints, image_features: Floats) -> Floats:
        """Embed ids i64 [B, S]; image placeholders take `image_features` f32 [M, H] in order. Gives f32 [B, S, H]."""
        ...

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """Give an empty cache for `batch` rows of at most `capacity` tokens."""
        ...

    def forward(
        self, inputs_embeds: Floats, positions: Ints, cache: Cache, logits_index: Ints, captures: bool = False
    ) -> StepOutput:
        """Run `inputs_embeds` [B, S, H] at `positions` [B, S] after `cache`; logits for the slots `logits_index` [L].

        A session keeps to B == 1 with all S positions inside one attention chunk, or S == 1 with any B, and to
        positions that continue each row's `cache.lengths`, which grow by S.
        """
        ...

    def close(self) -> None:
        """Free what the backend holds; it is not used afterwards."""
        ...
