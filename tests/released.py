"""config.json of the released Llama 4 models, and the forms that versions of transformers save it in.

Scout, Maverick and Llama Guard 4 as values of our own writing. `saved` follows what transformers 4.51.3, 4.56.2 and
5.23.0 wrote when each of them read and saved these values.
"""

from __future__ import annotations

import copy
from typing import Any

LLAMA3_ROPE = {
    "factor": 16.0,
    "high_freq_factor": 1.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
TEXT: dict[str, Any] = {
    "_attn_implementation_autoset": True,
    "attention_bias": False,
    "attention_chunk_size": 8192,
    "attention_dropout": 0.0,
    "attn_scale": 0.1,
    "attn_temperature_tuning": 4,
    "bos_token_id": 200000,
    "cache_implementation": "hybrid",
    "eos_token_id": [200001, 200007, 200008],
    "floor_scale": 8192,
    "for_llm_compressor": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
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
    "output_router_logits": False,
    "pad_token_id": 200018,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3_ROPE,
    "rope_theta": 500000.0,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_qk_norm": True,
    "vocab_size": 202048,
}
VISION: dict[str, Any] = {
    "_attn_implementation_autoset": True,
    "attention_dropout": 0.0,
    "hidden_act": "gelu",
    "hidden_size": 1408,
    "image_size": 336,
    "initializer_range": 0.02,
    "intermediate_size": 5632,
    "model_type": "llama4_vision_model",
    "multi_modal_projector_bias": False,
    "norm_eps": 1e-05,
    "num_attention_heads": 16,
    "num_channels": 3,
    "num_hidden_layers": 34,
    "patch_size": 14,
    "pixel_shuffle_ratio": 0.5,
    "projector_dropout": 0.0,
    "projector_input_dim": 4096,
    "projector_output_dim": 4096,
    "rope_theta": 10000,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "vision_output_dim": 4096,
}
CHANGES: dict[str, dict[str, Any]] = {
    "scout": {},
    "scout base": {"max_position_embeddings": 262144, "eos_token_id": 200001},
    "maverick": {
        "interleave_moe_layer_step": 2,
        "max_position_embeddings": 1048576,
        "num_local_experts": 128,
        "rope_scaling": None,
        "use_qk_norm": False,
    },
    "guard": {
        "attention_chunk_size": None,
        "attn_temperature_tuning": False,
        "interleave_moe_layer_step": 0,
        "intermediate_size_mlp": 8192,
        "max_position_embeddings": 131072,
        "moe_layers": [],
        "no_rope_layers": [1] * 48,
        "num_local_experts": 0,
    },
}
VERSIONS = ("4.51.3", "4.56.2", "5.23.0")


def released(name: str) -> dict[str, Any]:
    """The config.json of `name`, a key of `CHANGES`."""
    data: dict[str, Any] = {
        "architectures": ["Llama4ForConditionalGeneration"],
        "boi_token_index": 200080,
        "eoi_token_index": 200081,
        "image_token_index": 200092,
        "model_type": "llama4",
        "text_config": {**TEXT, **CHANGES[name]},
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "vision_config": VISION,
    }
    return copy.deepcopy(data)


def saved(data: dict[str, Any], version: str) -> dict[str, Any]:
    """`data` as the version of transformers saves it, one of `VERSIONS`."""
    data = copy.deepcopy(data)
    text, vision = data["text_config"], data["vision_config"]
    layers = range(text["num_hidden_layers"])
    text["no_rope_layers"] = text["no_rope_layers"] or [int((layer + 1) % 4 != 0) for layer in layers]
    step = text["interleave_moe_layer_step"]
    text["moe_layers"] = text.get("moe_layers", [layer for layer in layers if step and layer % step == step - 1])
    if version != "4.51.3":
        text["layer_types"] = [("full" if rope == 0 else "chunked") + "_attention" for rope in text["no_rope_layers"]]
        for section in (data, text):
            section["dtype"] = section.pop("torch_dtype")
    if version == "5.23.0":
        scaling = text.pop("rope_scaling") or {"rope_type": "default"}
        text["rope_parameters"] = {**scaling, "rope_theta": text.pop("rope_theta")}
        vision["rope_parameters"] = {"rope_type": "default", "rope_theta": vision.pop("rope_theta")}
        text |= {
            "attn_temperature_tuning": bool(text["attn_temperature_tuning"]),  # its class refuses a number
            "no_rope_layer_interval": 4,
            "tie_word_embeddings": False,
        }
    return data | {"transformers_version": version}
