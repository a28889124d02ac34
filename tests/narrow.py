"""A released model's shape at small width, under a name of its own among the synthetic models."""

from __future__ import annotations

import pytest

from arriero.graphs.sources.released_configs import RELEASED, released_config

TEXT = {
    "attention_chunk_size": 128,
    "floor_scale": 128,
    "head_dim": 32,
    "hidden_size": 256,
    "intermediate_size": 128,
    "intermediate_size_mlp": 256,
    "max_position_embeddings": 4096,
    "num_attention_heads": 8,
    "num_hidden_layers": 8,
    "num_key_value_heads": 2,
}
VISION = {
    "hidden_size": 64,
    "image_size": 56,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "projector_input_dim": 128,
    "projector_output_dim": 128,
    "vision_output_dim": 128,
}


def add_narrow(patch: pytest.MonkeyPatch, released: str, **changes: object) -> str:
    """Make `synthetic://narrow-..` of a released model known, with `changes` to its text; gives the name."""
    config, name = released_config(released), f"narrow-{released}"
    config["text_config"] |= TEXT | changes
    config["vision_config"] |= VISION
    patch.setitem(RELEASED, name, config)
    return name
