"""Tiny random checkpoints of both released shapes, in Hugging Face layout, for every test that needs a model.

Router weights are drawn small: with saturated sigmoids a wrong op (score on the output) would nearly pass.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.config import ModelConfig
from arriero.graphs.model import Llama4
from arriero.graphs.names import TEXT_PREFIX, expected_tensors

VOCABULARY = 160
IMAGE_TOKEN = 159


def make_scout_toy(folder: Path, seed: int, vision: bool = True, **changes: Any) -> Path:
    """Scout's shape: all MoE, QK-norm, llama3 RoPE scaling, 3 chunked + 1 global layers, temperature tuning.

    `changes` override keys of the text config.
    """
    text = {
        **_text(),
        "num_local_experts": 4,
        "interleave_moe_layer_step": 1,
        "use_qk_norm": True,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 64,
        },
        **changes,
    }
    if not vision:
        return _write(folder, {**text, "model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"]}, seed)
    config = {
        "model_type": "llama4",
        "architectures": ["Llama4ForConditionalGeneration"],
        "text_config": {**text, "model_type": "llama4_text"},
        "vision_config": {
            "model_type": "llama4_vision_model",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 128,
            "num_channels": 3,
            "image_size": 32,
            "patch_size": 8,
            "pixel_shuffle_ratio": 0.5,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
            "vision_output_dim": 64,
            "rope_theta": 10000.0,
        },
        "image_token_index": IMAGE_TOKEN,
        "boi_token_index": IMAGE_TOKEN - 1,
        "eoi_token_index": IMAGE_TOKEN - 2,
    }
    return _write(folder, config, seed)


def make_maverick_toy(folder: Path, seed: int, **changes: Any) -> Path:
    """Maverick's shape: dense and MoE layers interleaved, 128 experts, no QK-norm, unscaled RoPE; text only.

    `changes` override keys of the config.
    """
    config = {
        **_text(),
        "model_type": "llama4_text",
        "architectures": ["Llama4ForCausalLM"],
        "num_local_experts": 128,
        "interleave_moe_layer_step": 2,
        "use_qk_norm": False,
        "rope_scaling": None,
        **changes,
    }
    return _write(folder, config, seed)


# What Llama Guard 4's config.json says beside its sizes: no experts, rotary and unchunked attention throughout.
DENSE: dict[str, Any] = {
    "moe_layers": [],
    "num_local_experts": 0,
    "interleave_moe_layer_step": 0,
    "no_rope_layer_interval": 80,  # beyond the last layer
    "attention_chunk_size": None,
    "attn_temperature_tuning": False,
    "intermediate_size": 96,
    "intermediate_size_mlp": 96,
}


def make_guard_toy(folder: Path, seed: int, **changes: Any) -> Path:
    """Llama Guard 4's shape: dense layers alone, all rotary and global; text only. `changes` as for Maverick's."""
    return make_scout_toy(folder, seed, vision=False, **{**DENSE, **changes})


def load_reference(folder: Path) -> Llama4:
    """The torch reference of a toy, with its stored bf16 weights widened on the fly."""
    checkpoint = Checkpoint.open(folder)
    with torch.device("meta"):
        model = Llama4(ModelConfig.load(folder))
    model.load_state_dict({name: checkpoint.torch_tensor(name) for name in checkpoint.tensors}, assign=True)
    return model.eval().requires_grad_(False)


def _text() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 32,
        "intermediate_size_mlp": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 16,
        "no_rope_layer_interval": 4,
        "attn_temperature_tuning": True,
        "floor_scale": 8,
        "attn_scale": 0.1,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _write(folder: Path, data: dict[str, Any], seed: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(data, indent=1))
    config = ModelConfig.from_dict(data, "config.json")
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_tensors(config).items():
        noise = torch.randn(shape, generator=draw)
        if len(shape) == 1:
            values = 0.1 * noise + (0.0 if name.endswith("bias") else 1.0)
        elif "embed" in name:
            values = noise
        else:
            fan_in = shape[-2] if len(shape) == 3 else shape[-1]
            values = noise * fan_in**-0.5 * (0.5 if "router" in name else 1.0)
        tensors[name.removeprefix(TEXT_PREFIX) if config.text_only else name] = values.to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
