"""Shows the global layer where a recalled note lies, while it trains.

Across a chunk boundary only the global layer can find a note, and answers alone teach it too slowly. So one of its
heads is told, for each key in an answer, to attend to that key's value among the notes; and the stream that enters the
layer has to say, through a linear head that is thrown away, which token came before. Both losses are of training only.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arriero.graphs.model import Llama4, temperature
from arriero.models.batches import IGNORED, Batch
from arriero.profiles.data.words import KEYS
from arriero.runtimes.processor.processor import Processor

HEAD = 0  # the query head that is told


class RecallGuide:
    """Keeps the global layer's last input and gives the guiding loss of a batch of recall conversations."""

    def __init__(self, model: Llama4, processor: Processor) -> None:
        text = model.config.text
        index = next(number for number, layer in enumerate(text.layers) if not layer.rope)
        layers: Any = model.language_model.model.layers
        self.config, self.layer = text, layers[index]
        self.before = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.keys = torch.tensor([int(processor.tokenize(key)[0]) for key in KEYS])
        self.entered = torch.zeros(0)
        self.layer.register_forward_pre_hook(self.keep)

    def keep(self, _layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Note the stream that enters the layer [B, S, H]."""
        self.entered = inputs[0]

    def loss(self, batch: Batch) -> tuple[Tensor, float]:
        """The guiding loss of the batch just run, and the share of keys whose value gets the most attention."""
        rows, queries, values = find_notes(batch, self.keys)
        previous = self.before(self.entered[:, 1:][batch.real[:, 1:]])
        loss = F.cross_entropy(previous, batch.input_ids[:, :-1][batch.real[:, 1:]])
        if not len(rows):
            return loss, 0.0
        attention = self.layer.self_attn
        x = self.layer.input_layernorm(self.entered)
        size, share = self.config.head_dim, self.config.heads // self.config.kv_heads
        positions = torch.arange(x.shape[1]) + batch.starts[:, None]
        q = (attention.q_proj(x) * temperature(positions, self.config)).unflatten(-1, (-1, size))[rows, queries, HEAD]
        k = attention.k_proj(x).unflatten(-1, (-1, size))[:, :, HEAD // share]  # [B, S, D]
        logits = torch.einsum("nd,nsd->ns", q, k[rows]) / math.sqrt(size)
        logits = logits.masked_fill(torch.arange(x.shape[1]) > queries[:, None], float("-inf"))
        right = (logits.argmax(-1) == values).float().mean()
        return loss + F.cross_entropy(logits, values), float(right)


def find_notes(batch: Batch, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row, position of each key in an answer, and position of its value among the notes, each int64 [n]."""
    ids, targets = batch.input_ids, batch.targets
    rows, queries = torch.nonzero((targets != IGNORED) & torch.isin(ids, keys), as_tuple=True)
    pair = (ids[rows, :-1] == ids[rows, queries][:, None]) & (ids[rows, 1:] == targets[rows, queries][:, None])
    first = pair.float().argmax(-1) + 1  # [n], the value's position in the first occurrence of the pair
    kept = pair.any(-1) & (first < queries)
    return rows[kept], queries[kept], first[kept]
