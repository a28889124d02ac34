"""The weights of the reference: mapped from their files, and those that are decoded, a few layers of them at a time.

A decoded weight is made when it is needed: a layer's matrices together, its experts, the embedding and the head each
apart. Of a model that fits `ROOM` they stay, so that it is decoded once; of a larger one they go as others are needed,
since all of it comes round before any is needed again. Whoever goes through a layer expert by expert asks for one after
the other, and they are not held at all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from arriero.export.proof.decoded_memory import LAYERS, fits, group_of, is_decoded
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.model import Llama4
from arriero.graphs.names import EMBEDDING, HEAD, expert_tensors


class ResidentWeights:
    """Fills a model on the meta device from a checkpoint, and holds of what is decoded all or what is needed."""

    def __init__(self, model: Llama4, checkpoint: Checkpoint, names: Collection[str]) -> None:
        """Give `model` the tensors `names`; decoded ones come with the first call of the module that reads them."""
        self._checkpoint = checkpoint
        self._groups: dict[str, list[str]] = {}  # path of the module whose call needs them -> tensors
        self._held: set[str] = set()
        self._pinned: list[str] = []
        self._model = model
        self._all_stay = fits(checkpoint.tensors[name] for name in names)
        tied = model.config.text.tied_embeddings  # then the head reads the embedding, which nobody calls for it
        for name in names:
            group = group_of(name)
            if is_decoded(checkpoint.tensors[name]) and group and not (tied and name == EMBEDDING):
                self._groups.setdefault(group, []).append(name)
            else:
                self._set(name, checkpoint.torch_tensor(name))
        for group in self._groups:
            model.get_submodule(group).register_forward_pre_hook(self._loads(group))

    def expert(self, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The gate|up [H, 2F] and down [F, H] of one expert, in float32; they are not held."""
        gate_up, down = (self._rows(name, expert, expert + 1)[0] for name in expert_tensors(layer))
        return gate_up, down

    def head(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of the head [V, H], in float32; they are not held."""
        return self._rows(EMBEDDING if self._model.config.text.tied_embeddings else HEAD, start, stop)

    def _rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return torch.from_numpy(self._checkpoint.read_float32(name, start, stop))

    def _loads(self, group: str) -> Callable[..., None]:
        def before(*_: Any) -> None:
            self._load(group)

        return before

    @contextmanager
    def holding(self, layer: int) -> Iterator[None]:
        """Within the block, the weights of `layer` but for its experts are there and stay."""
        group = f"{LAYERS}.{layer}"
        self._load(group)
        self._pinned.append(group)
        try:
            yield
        finally:
            self._pinned.remove(group)

    def _load(self, group: str) -> None:
        if group not in self._groups or group in self._held:
            return
        # a layer that runs needs its own matrices beside its experts
        over = {one for one in self._held if one not in self._pinned and not group.startswith(f"{one}.")}
        for other in set() if self._all_stay else over:
            for name in self._groups[other]:
                self._set(name, torch.empty(self._checkpoint.tensors[name].shape, device="meta"))
            self._held.remove(other)
        for name in self._groups[group]:
            self._set(name, self._checkpoint.torch_tensor(name))
        self._held.add(group)

    def _set(self, name: str, values: torch.Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        setattr(self._model.get_submodule(owner), leaf, nn.Parameter(values, requires_grad=False))
