"""The config of a GGUF file as config.json would have it, and the files beside it, from the file's own keys.

What the format has no key for is what llama.cpp takes a Llama 4 for: a NoPE layer in four, chunks and temperature steps
of 8192 tokens, QK-norm unless there are 128 experts. `feed_forward_length` there is the width of dense layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from arriero.errors import ArrieroError
from arriero.graphs.sources.tower_config import with_tower
from arriero.graphs.sources.weight_source import WeightSource

ARCHITECTURE = "llama4"
RELEASED = 8192  # tokens: chunk, temperature steps, and context before RoPE was stretched
INTERVAL = 4  # one layer in so many has no rotary embedding
MAVERICK = 128  # experts, of the one released model without QK-norm
PATCH = "<|patch|>"


def text_config(
    keys: Mapping[str, Any], tensors: Mapping[str, WeightSource], factors: Any, where: str
) -> dict[str, Any]:
    """The text section; `factors` [D/2] are what the file divides the frequencies by, None without."""

    def key(name: str, default: Any = None) -> Any:
        value = keys.get(f"{ARCHITECTURE}.{name}", default)
        if value is None:
            raise ArrieroError("is missing", where=f"{where}:{ARCHITECTURE}.{name}", remedy="Convert the model again")
        return value

    layers, heads, experts = (
        key("block_count"),
        key("attention.head_count"),
        keys.get(f"{ARCHITECTURE}.expert_count", 0),
    )
    head_dim = keys.get(f"{ARCHITECTURE}.attention.key_length") or key("embedding_length") // heads
    chunk = key("attention.sliding_window", RELEASED)
    everywhere = chunk == 0  # every layer is rotary and global
    step = keys.get(f"{ARCHITECTURE}.interleave_moe_layer_step", 0) if experts else 0
    theta = float(key("rope.freq_base"))
    return {
        "model_type": "llama4_text",
        "vocab_size": next(source.shape[0] for name, source in tensors.items() if name.endswith("embed_tokens.weight")),
        "hidden_size": key("embedding_length"),
        "intermediate_size": key("expert_feed_forward_length", key("feed_forward_length")),
        "intermediate_size_mlp": key("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key("attention.head_count_kv"),
        "head_dim": head_dim,
        "num_local_experts": experts or 1,
        "num_experts_per_tok": keys.get(f"{ARCHITECTURE}.expert_used_count", 1) or 1,
        "moe_layers": [*range(step - 1, layers, step)] if step else [],
        "no_rope_layers": [int(everywhere or (layer + 1) % INTERVAL != 0) for layer in range(layers)],
        "attention_chunk_size": None if everywhere else chunk,
        "use_qk_norm": experts != MAVERICK,
        "attn_temperature_tuning": not everywhere,
        "floor_scale": key("attention.temperature_length", RELEASED),
        "attn_scale": float(np.float32(key("attention.temperature_scale", 0.1)).item().__round__(7)),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(factors, theta, head_dim, where),
        "rms_norm_eps": float(f"{key('attention.layer_norm_rms_epsilon'):.6g}"),  # stored in float32
        "max_position_embeddings": key("context_length"),
        "tie_word_embeddings": not any(name.endswith("lm_head.weight") for name in tensors),
        "bos_token_id": keys.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": closing_tokens(keys),
        "pad_token_id": keys.get("tokenizer.ggml.padding_token_id"),
    }


def closing_tokens(keys: Mapping[str, Any]) -> list[int]:
    """The ids that end an answer: of a text, of a turn, and of a message to a tool."""
    names = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = [keys[f"tokenizer.ggml.{name}"] for name in names if f"tokenizer.ggml.{name}" in keys]
    named = ("<|end_of_text|>", "<|eom|>", "<|eot|>")
    tokens = keys.get("tokenizer.ggml.tokens") or []
    ids += [number for number, token in enumerate(tokens) if token in named]
    return sorted(set(ids))


def _rope_scaling(factors: Any, theta: float, head_dim: int, where: str) -> dict[str, Any] | None:
    """Scout's scaling where the factors are those that it gives; no other is in use."""
    if factors is None or np.all(factors == 1):
        return None
    factor = float(factors.max())
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    if factors.shape != wavelengths.shape or not np.array_equal(factors, np.where(wavelengths > RELEASED, factor, 1)):
        raise ArrieroError(
            "divides the rotary frequencies in a way that no Llama 4 does",
            where=where,
            expected=f"one factor for wavelengths above {RELEASED} positions, 1 below",
            remedy="Convert the model again with today's llama.cpp",
        )
    ends = {"low_freq_factor": 1.0, "high_freq_factor": 1.0, "original_max_position_embeddings": RELEASED}
    return {"rope_type": "llama3", "factor": factor, **ends}


def multimodal_config(
    text: Mapping[str, Any],
    text_keys: Mapping[str, Any],
    keys: Mapping[str, Any],
    tensors: Mapping[str, WeightSource],
    where: str,
) -> dict[str, Any]:
    """The config of a model with the tower in the file `where`, of its `keys` and `tensors`."""

    def key(name: str) -> Any:
        if f"clip.vision.{name}" not in keys:
            raise ArrieroError("is missing", where=f"{where}:clip.vision.{name}", remedy="Convert the model again")
        return keys[f"clip.vision.{name}"]

    projector = keys.get("clip.vision.projector_type") or keys.get("clip.projector_type")
    if projector != ARCHITECTURE:
        raise ArrieroError(f"is a vision tower for {projector!r}", where=where, expected=ARCHITECTURE)
    tokens = text_keys.get("tokenizer.ggml.tokens") or []
    return with_tower(
        text,
        tensors,
        next((number for number, token in enumerate(tokens) if token == PATCH), None),
        hidden_size=key("embedding_length"),
        layers=key("block_count"),
        heads=key("attention.head_count"),
        image_size=key("image_size"),
        patch_size=key("patch_size"),
        shuffle=1 / key("projector.scale_factor"),
    )
