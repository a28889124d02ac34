"""The PyTorch reference as a backend: float32 arithmetic over the checkpoint's own weights, with every capture.

It judges the other backends, so it shares no cache with them.
Shapes: B batch rows, S new tokens per row, P past slots, H hidden, K key/value heads, D head dimension, L slots that
get logits, k experts per token, M image placeholder tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arriero.errors import ArrieroError
from arriero.export.build_file.model_spec import model_spec
from arriero.export.proof.resident import ResidentWeights
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.model import KeyValue, Llama4
from arriero.graphs.names import expected_tensors
from arriero.graphs.sources.ledger import check_ledger
from arriero.runtimes.backend import Cache, Floats, Ints, ModelSpec, StepOutput
from arriero.runtimes.cache import check_room
from arriero.runtimes.processor.processor import Processor
from arriero.runtimes.session import Session
from arriero.runtimes.snapshot import Buffer, Snapshot, check_truncation, slots_held
from arriero.traits import PREFILL_PIECE

Margins = dict[int, list[Floats]]
_recording: ContextVar[Margins | None] = ContextVar("router_margins", default=None)


@dataclass
class _Row:
    """One row's past: per layer key and value [1, K, P, D]. Tensors are replaced, never written to, so rows share."""

    past: list[KeyValue]


class TorchCache:
    """All past keys and values of B rows; chunked layers keep theirs too, and the attention's mask hides them.

    Keeping everything leaves the chunk rule to the mask alone, apart from the slot arithmetic of the other backends.
    """

    def __init__(self, spec: ModelSpec, rows: list[_Row], lengths: Ints, capacity: int) -> None:
        """Hold `rows` of at most `capacity` tokens; `lengths` [B] is shared with the cache these rows are of."""
        self._spec, self._rows, self.lengths, self._capacity = spec, rows, lengths, capacity
        self.adapters: Ints = np.zeros(len(rows), np.int64)  # of adapters this side knows merged ones alone

    @property
    def capacity(self) -> int:
        """Most tokens a row may hold."""
        return self._capacity

    def rows(self, start: int, stop: int) -> TorchCache:
        """Rows `start` to `stop` as a cache that shares this one's memory and lengths."""
        return TorchCache(self._spec, self._rows[start:stop], self.lengths[start:stop], self._capacity)

    def reserve(self, tokens: int) -> None:
        """Nothing: what a row holds grows by what comes."""

    def copy_row(self, source: int, target: int) -> None:
        """Make row `target` hold what row `source` holds."""
        self._rows[target].past = list(self._rows[source].past)
        self.lengths[target] = self.lengths[source]

    def truncate(self, row: int, length: int) -> None:
        """Keep the first `length` tokens of `row`, where every backend can: see `Cache.truncate`."""
        check_truncation(self._spec, int(self.lengths[row]), length)
        self._rows[row].past = [(key[:, :, :length], value[:, :, :length]) for key, value in self._rows[row].past]
        self.lengths[row] = length

    def snapshot(self, row: int, start: int = 0) -> Snapshot:
        """Copy what the next tokens of `row` may see: see `Cache.snapshot`."""
        length = int(self.lengths[row])
        held = [min(slots, length - start) for slots in slots_held(self._spec, length)]
        keys, values = (
            tuple(
                layer[which][0, :, length - slots :].numpy().copy()
                for layer, slots in zip(self._rows[row].past, held, strict=True)
            )
            for which in (0, 1)
        )
        return Snapshot(self._spec, length, keys, values, start=start)

    def restore(self, row: int, snapshot: Snapshot) -> None:
        """Make `row` hold what `snapshot` was taken of: see `Cache.restore`."""
        snapshot.check_whole(self._spec)
        snapshot.check_dtype(np.dtype(np.float32))
        check_room(snapshot.length, self.capacity)
        self._rows[row].past = [
            (_restored(key, snapshot.length), _restored(value, snapshot.length))
            for key, value in zip(snapshot.keys, snapshot.values, strict=True)
        ]
        self.lengths[row] = snapshot.length

    def padded(self) -> tuple[list[KeyValue], Tensor]:
        """Per layer key and value [B, K, P, D] for the longest row's P, and their positions [B, P], -1 where empty."""
        longest = int(self.lengths.max(initial=0))
        slots = torch.arange(longest)
        positions = torch.stack([torch.where(slots < length, slots, -1) for length in self.lengths.tolist()])
        layers = range(len(self._rows[0].past))
        return [(self._stack(layer, 0, longest), self._stack(layer, 1, longest)) for layer in layers], positions

    def _stack(self, layer: int, which: int, longest: int) -> Tensor:
        held = [row.past[layer][which] for row in self._rows]
        return torch.cat([torch.nn.functional.pad(past, (0, 0, 0, longest - past.shape[2])) for past in held])

    def extend(self, present: list[KeyValue], steps: int) -> None:
        """Append the last `steps` slots of `present`, per layer key and value [B, K, P+S, D], to every row."""
        for number, row in enumerate(self._rows):
            row.past = [
                (
                    _joined(key, new_key[number : number + 1], steps),
                    _joined(value, new_value[number : number + 1], steps),
                )
                for (key, value), (new_key, new_value) in zip(row.past, present, strict=True)
            ]
        self.lengths += steps


class TorchBackend:
    """The reference in `graphs/model.py` behind the backend's methods. Weights keep the checkpoint's dtype."""

    piece, few_rows = PREFILL_PIECE, 0

    def __init__(self, checkpoint: Checkpoint | str | Path, text_only: bool = False) -> None:
        """Take a checkpoint, or open its folder; weights are mapped or decoded layer by layer. Raises ArrieroError.

        `text_only` leaves the vision tower of a multimodal checkpoint out.
        """
        opened = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.open(checkpoint)
        config = opened.model_config()
        expected = expected_tensors(config)
        check_ledger(opened.tensors.values(), expected)
        if text_only:
            config = config.without_vision()
            expected = expected_tensors(config)
        with torch.device("meta"):
            model = Llama4(config)
        self._adopt(model, ResidentWeights(model, opened, expected))

    @classmethod
    def of(cls, model: Llama4) -> TorchBackend:
        """The backend over a model that is already in memory."""
        backend = cls.__new__(cls)
        backend._adopt(model, None)
        return backend

    def _adopt(self, model: Llama4, weights: ResidentWeights | None) -> None:
        self.model, self._weights = model.requires_grad_(False).eval(), weights
        self.spec = model_spec(model.config)
        self.forces_routing = bool(model.config.text.moe_layers)

    @torch.inference_mode()
    def vision(self, pixel_values: Floats) -> Floats:
        """Turn tiles f32 [n, 3, h, w] into features f32 [n * tokens_per_tile, H]."""
        if self.spec.vision is None:
            raise ArrieroError("this checkpoint has no vision tower, so it cannot read images")
        return self.model.image_features(torch.from_numpy(np.ascontiguousarray(pixel_values))).numpy()

    @torch.inference_mode()
    def embed(self, input_ids: Ints, image_features: Floats) -> Floats:
        """Embed ids i64 [B, S], image placeholders taking `image_features` f32 [M, H] in order: f32 [B, S, H]."""
        features = torch.from_numpy(np.ascontiguousarray(image_features))
        return self.model.embed(torch.from_numpy(np.ascontiguousarray(input_ids)), features).numpy()

    def new_cache(self, batch: int, capacity: int) -> TorchCache:
        """Give an empty cache for `batch` rows of at most `capacity` tokens."""
        rows = [_Row(self.model.language_model.empty_cache(1)) for _ in range(batch)]
        return TorchCache(self.spec, rows, np.zeros(batch, np.int64), capacity)

    @torch.inference_mode()
    def forward(
        self, inputs_embeds: Floats, positions: Ints, cache: Cache, logits_index: Ints, captures: bool = False
    ) -> StepOutput:
        """Run `inputs_embeds` [B, S, H] at `positions` [B, S]: any B with any S, across chunk edges too."""
        assert isinstance(cache, TorchCache)
        batch, steps = positions.shape
        if not np.array_equal(positions, cache.lengths[:, None] + np.arange(steps)):
            raise ValueError("positions must continue the cache")
        check_room(int(cache.lengths.max()) + steps, cache.capacity)
        past, past_positions = cache.padded()
        result = self.model.language_model(
            torch.from_numpy(np.ascontiguousarray(inputs_embeds)),
            torch.from_numpy(np.ascontiguousarray(positions)),
            past_positions,
            past_positions,
            torch.from_numpy(np.ascontiguousarray(logits_index)),
            past,
        )
        cache.extend(result.present, steps)
        if not captures:
            return StepOutput(result.logits.numpy())
        moe = self.model.config.text.moe_layers
        return StepOutput(
            logits=result.logits.numpy(),
            expert_ids={
                layer: ids.view(batch, steps, -1).numpy() for layer, ids in zip(moe, result.expert_ids, strict=True)
            },
            hiddens={layer: hidden.numpy() for layer, hidden in enumerate(result.hiddens)},
        )

    def forward_forced(
        self, inputs_embeds: Floats, positions: Ints, cache: Cache, logits_index: Ints, expert_ids: Mapping[int, Ints]
    ) -> Floats:
        """The same with each token's experts given: see `ForcesRouting.forward_forced`; here no id may be -1.

        A router whose other logits are minus infinity chooses them, with the scores that it gives them.
        """
        layers: Any = self.model.language_model.model.layers
        hooks = [
            layers[layer].feed_forward.router.register_forward_hook(
                partial(_hide_others, torch.from_numpy(ids.reshape(-1, ids.shape[-1]).astype(np.int64)))
            )
            for layer, ids in expert_ids.items()
        ]
        try:
            return self.forward(inputs_embeds, positions, cache, logits_index).logits
        finally:
            for hook in hooks:
                hook.remove()

    def holding(self, layer: int) -> AbstractContextManager[None]:
        """Within the block, the weights of decoder `layer` but for its experts stay in memory."""
        return nullcontext() if self._weights is None else self._weights.holding(layer)

    def expert(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        """The gate|up [H, 2F] and down [F, H] of one expert in float32."""
        if self._weights is not None:
            return self._weights.expert(layer, expert)
        held: Any = self.model.language_model.model.layers[layer].feed_forward
        return held.experts.gate_up_proj[expert].float(), held.experts.down_proj[expert].float()

    def head(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the head [V, H] in float32."""
        if self._weights is not None:
            return self._weights.head(start, stop)
        text: Any = self.model.language_model
        weight = text.model.embed_tokens.weight if text.config.tied_embeddings else text.lm_head.weight
        return weight[start:stop].float()

    @contextmanager
    def router_margins(self) -> Iterator[Margins]:
        """Within the block, note per MoE layer how clear each choice was, one f32 [T] for each forward, in order.

        The margin is the k-th best minus the (k+1)-th best router logit. Only this thread's forwards are noted.
        """
        text, noted = self.model.config.text, Margins()
        layers: Any = self.model.language_model.model.layers
        routers = {
            layer: layers[layer].feed_forward.router
            for layer in text.moe_layers
            if text.experts > text.experts_per_token  # else there is no next best
        }
        hooks = [
            router.register_forward_hook(partial(_note_margin, noted, layer, text.experts_per_token))
            for layer, router in routers.items()
        ]
        token = _recording.set(noted)
        try:
            yield noted
        finally:
            _recording.reset(token)
            for hook in hooks:
                hook.remove()

    def close(self) -> None:
        """Drop the model; its memory maps go with it."""
        del self.model


def open_reference(checkpoint: Checkpoint, text_only: bool) -> Session:
    """The PyTorch reference of a checkpoint, as a session. Raises `ArrieroError` when it is not sound."""
    backend = TorchBackend(checkpoint, text_only)
    return Session(backend, Processor(checkpoint.side_folder, backend.spec))


def _joined(past: Tensor, present: Tensor, steps: int) -> Tensor:
    return torch.cat([past, present[:, :, present.shape[2] - steps :]], dim=2)


def _restored(held: Buffer, length: int) -> Tensor:
    """One row's keys or values [1, K, length, D], of which `held` [K, P, D] are the last; the mask hides the others."""
    past = torch.zeros((1, held.shape[0], length, held.shape[2]))
    past[0, :, length - held.shape[1] :] = torch.from_numpy(held)
    return past


def _hide_others(ids: Tensor, router: torch.nn.Module, inputs: Any, logits: Tensor) -> Tensor:
    """The router's logits [T, E] of the experts `ids` [T, k], minus infinity of all others."""
    return torch.full_like(logits, -torch.inf).scatter(-1, ids, logits.gather(-1, ids))


def _note_margin(
    noted: Margins, layer: int, per_token: int, router: torch.nn.Module, inputs: Any, logits: Tensor
) -> None:
    if _recording.get() is noted:  # a hook sees the forwards of every thread
        best = logits.topk(per_token + 1, dim=-1).values  # [T, k+1]
        noted.setdefault(layer, []).append((best[:, -2] - best[:, -1]).numpy())
