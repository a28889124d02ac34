"""Stores byte for byte what every other pass has left of the checkpoint's tensors."""

from __future__ import annotations

import onnx_ir as ir

from arriero.graphs.stored.weight_store import WeightStore


def keep_weights(model: ir.Model, store: WeightStore) -> int:
    """Store the checkpoint tensors that are still used byte for byte (the embedding table); give how many."""
    names = [name for name, value in model.graph.initializers.items() if name in store.checkpoint.tensors]
    left = [name for name in names if name not in store.table and model.graph.initializers[name].uses()]
    for name in left:
        store.stored(name)
    return len(left)
