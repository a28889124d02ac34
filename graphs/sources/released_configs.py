"""config.json of the released Llama 4 models, as far as it says what they compute: Scout, Maverick, Llama Guard 4."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

TEXT: Mapping[str, Any] = {
    "attention_bias": False,
    "attention_chunk_size": 8192,
    "attn_scale": 0.1,
    "attn_temperature_tuning": 4,
    "bos_token_id": 200000,
    "eos_token_id": [200001, 200007, 200008],
    "floor_scale": 8192,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "interleave_moe_layer_step": 1,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "max_position_embeddings": 10485760,
    "model_type": "llama4_text",
    "no_rope_layers": [],
    "num_attention_heads": 40,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 48,
    "num_key_value_heads": 8,
    "num_local_experts": 16,
    "pad_token_id": 200018,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 16.0,
        "high_freq_factor": 1.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "use_qk_norm": True,
    "vocab_size": 202048,
}
VISION: Mapping[str, Any] = {
    "hidden_act": "gelu",
    "hidden_size": 1408,
    "image_size": 336,
    "intermediate_size": 5632,
    "model_type": "llama4_vision_model",
    "multi_modal_projector_bias": False,
    "norm_eps": 1e-05,
    "num_attention_heads": 16,
    "num_channels": 3,
    "num_hidden_layers": 34,
    "patch_size": 14,
    "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 4096,
    "projector_output_dim": 4096,
    "rope_theta": 10000,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "vision_output_dim": 4096,
}
SCOUT: Mapping[str, Any] = {
    "architectures": ["Llama4ForConditionalGeneration"],
    "boi_token_index": 200080,
    "eoi_token_index": 200081,
    "image_token_index": 200092,
    "model_type": "llama4",
    "text_config": TEXT,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "vision_config": VISION,
}
MAVERICK_TEXT = {
    "interleave_moe_layer_step": 2,
    "max_position_embeddings": 1048576,
    "num_local_experts": 128,
    "rope_scaling": None,
    "use_qk_norm": False,
}
GUARD_TEXT = {
    "attention_chunk_size": None,
    "attn_temperature_tuning": False,
    "interleave_moe_layer_step": 0,
    "intermediate_size_mlp": 8192,
    "max_position_embeddings": 131072,
    "moe_layers": [],
    "no_rope_layers": [1] * 48,
    "num_local_experts": 0,
}
RELEASED: dict[str, Mapping[str, Any]] = {
    "scout": SCOUT,
    "maverick": {**SCOUT, "text_config": {**TEXT, **MAVERICK_TEXT}},
    "guard": {**SCOUT, "text_config": {**TEXT, **GUARD_TEXT}},
}


def released_config(name: str) -> dict[str, Any]:
    """A copy of the config.json of `name`, a key of `RELEASED`."""
    return copy.deepcopy(dict(RELEASED[name]))
