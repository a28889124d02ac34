"""Meta's params.json as config.json would have it. What the file does not say, the tensors' shapes do.

Source: `llama_models.llama4.args`; the contexts are those of the released instruct models, which no file states.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arriero.errors import ArrieroError
from arriero.graphs.names import TEXT_PREFIX
from arriero.graphs.sources.tower_config import with_tower
from arriero.graphs.sources.weight_source import WeightSource

CONTEXTS = {16: 10 << 20, 128: 1 << 20}  # by the number of experts
DENSE_CONTEXT = 8192
ORIGINAL_CONTEXT = 8192  # before RoPE was stretched
BEGIN, PAD, PATCH = "<|begin_of_text|>", "<|finetune_right_pad|>", "<|patch|>"
CLOSING = ("<|end_of_text|>", "<|eom|>", "<|eot|>")


def read_params(
    params: Mapping[str, Any], tensors: Mapping[str, WeightSource], ids: Mapping[str, int], where: str
) -> dict[str, Any]:
    """The config of a model with these `tensors`, by canonical name, and the `ids` of its control tokens.

    Raises ArrieroError for a missing key.
    """

    def key(name: str) -> Any:
        if name not in params:
            remedy = "Download params.json again, beside the files of the same model"
            raise ArrieroError("is missing", where=f"{where}:{name}", remedy=remedy)
        return params[name]

    moe = params.get("moe_args") or {}
    layers, heads, step = key("n_layers"), key("n_heads"), moe.get("interleave_moe_layer_step", 1)
    experts, interval = moe.get("num_experts", 0), params.get("nope_layer_interval")
    expert_width = _rows(tensors, "feed_forward.shared_expert.gate_proj.weight")
    dense_width = _rows(tensors, "feed_forward.gate_proj.weight")
    text = {
        "model_type": "llama4_text",
        "vocab_size": tensors[f"{TEXT_PREFIX}model.embed_tokens.weight"].shape[0],
        "hidden_size": key("dim"),
        "intermediate_size": expert_width or dense_width,
        "intermediate_size_mlp": dense_width or expert_width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": params.get("n_kv_heads") or heads,
        "head_dim": params.get("head_dim") or key("dim") // heads,
        "num_local_experts": experts or 1,
        "num_experts_per_tok": moe.get("top_k", 1),
        "moe_layers": [*range(step - 1, layers, step)] if experts else [],
        "no_rope_layers": [int(interval is None or (layer + 1) % interval != 0) for layer in range(layers)],
        "attention_chunk_size": params.get("attention_chunk_size"),
        "use_qk_norm": params.get("use_qk_norm", False),
        "attn_temperature_tuning": params.get("attn_temperature_tuning", False),
        "floor_scale": int(params.get("floor_scale", 8192)),
        "attn_scale": float(params.get("attn_scale", 0.1)),
        "rope_theta": float(params.get("rope_theta", 500000)),
        "rope_scaling": _rope_scaling(params),
        "rms_norm_eps": float(params.get("norm_eps", 1e-5)),
        "max_position_embeddings": CONTEXTS.get(experts, DENSE_CONTEXT),
        "tie_word_embeddings": False,
        "bos_token_id": ids.get(BEGIN),
        "eos_token_id": [ids[token] for token in CLOSING if token in ids],
        "pad_token_id": ids.get(PAD),
    }
    vision = params.get("vision_args")
    if vision is None:
        return text
    return with_tower(
        text,
        tensors,
        ids.get(PATCH),
        hidden_size=vision["dim"],
        layers=vision["n_layers"],
        heads=vision["n_heads"],
        image_size=vision["image_size"]["height"],
        patch_size=vision["patch_size"]["height"],
        shuffle=vision["pixel_shuffle_ratio"],
    )


def _rows(tensors: Mapping[str, WeightSource], ending: str) -> int:
    return next((source.shape[0] for name, source in tensors.items() if name.endswith(ending)), 0)


def _rope_scaling(params: Mapping[str, Any]) -> dict[str, Any] | None:
    if not params.get("use_scaled_rope"):
        return None
    return {
        "rope_type": "llama3",
        "factor": float(params.get("rope_scaling_factor") or 16),
        "low_freq_factor": 1.0,
        "high_freq_factor": float(params.get("rope_high_freq_factor") or 1),
        "original_max_position_embeddings": ORIGINAL_CONTEXT,
    }
