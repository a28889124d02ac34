"""A multimodal config.json, of its text section and of what a layout says of the vision tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arriero.graphs.sources.weight_source import WeightSource

ADAPTER = "vision_model.vision_adapter.mlp.fc2.weight"  # [projector output, projector input]


def with_tower(
    text: Mapping[str, Any],
    tensors: Mapping[str, WeightSource],
    image_token: int | None,
    *,
    hidden_size: int,
    layers: int,
    heads: int,
    image_size: int,
    patch_size: int,
    shuffle: float,
) -> dict[str, Any]:
    """The whole config; `shuffle` is the pixel shuffle's ratio, sizes are in elements or pixels.

    Raises KeyError where `tensors` has no adapter.
    """
    outputs, inputs = tensors[ADAPTER].shape
    tower = {
        "model_type": "llama4_vision_model",
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": round(hidden_size / shuffle**2),
        "image_size": image_size,
        "patch_size": patch_size,
        "num_channels": 3,
        "pixel_shuffle_ratio": shuffle,
        "projector_input_dim": inputs,
        "projector_output_dim": outputs,
        "vision_output_dim": outputs,
        "rope_theta": 10000.0,
    }
    shared = {"image_token_index": image_token} | {key: text[key] for key in ("bos_token_id", "eos_token_id")}
    return {"model_type": "llama4", "text_config": dict(text), "vision_config": tower, **shared}
