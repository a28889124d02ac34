"""The weights of the reference: mapped from their files, and those that are decoded, a few layers of them at a time.

A decoded weight is made in float32 when its layer is needed. Layers stay until others need the room, so that a small
model is decoded once, and of a large one no more than `ROOM` or one layer is held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from arriero.export.proof.decoded_memory import ROOM, is_decoded, layer_of
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.model import Llama4


class ResidentWeights:
    """Fills a model on the meta device from a checkpoint, and keeps its decoded layers within `ROOM`."""

    def __init__(self, model: Llama4, checkpoint: Checkpoint, names: Iterable[str]) -> None:
        """Give `model` the tensors `names`; those of decoded layers come with the first call of their layer."""
        self._checkpoint = checkpoint
        self._layers: dict[str, list[str]] = {}
        self._held: dict[str, int] = {}  # layer -> bytes, the longest unused first
        self._pinned: list[str] = []
        self._model = model
        decoded = {name: layer_of(name) for name in names if is_decoded(checkpoint.tensors[name])}
        for name, layer in decoded.items():
            if layer:
                self._layers.setdefault(layer, []).append(name)
        for name in names:
            if not decoded.get(name):
                self._set(name, checkpoint.torch_tensor(name))
        for layer in self._layers:
            model.language_model.model.layers[int(layer)].register_forward_pre_hook(self._loads(layer))

    def _loads(self, layer: str) -> Callable[..., None]:
        def before(*_: Any) -> None:
            self._load(layer)

        return before

    @contextmanager
    def holding(self, layer: int) -> Iterator[None]:
        """Within the block, the weights of `layer` are there and stay."""
        self._load(str(layer))
        self._pinned.append(str(layer))
        try:
            yield
        finally:
            self._pinned.remove(str(layer))

    def _load(self, layer: str) -> None:
        if layer not in self._layers:
            return
        if layer in self._held:
            self._held[layer] = self._held.pop(layer)
            return
        size = sum(self._checkpoint.tensors[name].nbytes for name in self._layers[layer])
        for other in [other for other in self._held if other not in self._pinned]:
            if sum(self._held.values()) + size <= ROOM:
                break
            for name in self._layers[other]:
                self._set(name, torch.empty(self._checkpoint.tensors[name].shape, device="meta"))
            del self._held[other]
        for name in self._layers[layer]:
            self._set(name, self._checkpoint.torch_tensor(name))
        self._held[layer] = size

    def _set(self, name: str, values: torch.Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        setattr(self._model.get_submodule(owner), leaf, nn.Parameter(values, requires_grad=False))
