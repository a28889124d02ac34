"""The embedded model "chasqui": Scout's shape in small, as a Hugging Face checkpoint folder without weights.

4 layers (3 chunked RoPE, 1 NoPE with temperature tuning), chunk 128, QK-norm, 16 experts top-1 + shared expert,
8 query and 2 key/value heads, a 3-layer vision tower with pixel shuffle and projector.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from arriero.models.skeleton import text_config, write_json, write_tokenizer
from arriero.profiles.data import FAMILIES, make

VOCABULARY = 1024
TILE = 64
PATCH = 8


def write_skeleton(folder: Path) -> None:
    """Write everything of the checkpoint but its weights into `folder`."""
    ids = write_tokenizer(folder, _texts(), VOCABULARY)
    files: dict[str, dict[str, Any]] = {
        "config.json": config(ids),
        "preprocessor_config.json": {
            "image_processor_type": "Llama4ImageProcessorFast",
            "size": {"height": TILE, "width": TILE},
            "max_patches": 4,
            "resize_to_max_canvas": False,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
        "processor_config.json": {
            "processor_class": "Llama4Processor",
            "patch_size": PATCH,
            "pixel_shuffle_ratio": 0.5,
            "fake_image_token": "<|image|>",
            "image_token": "<|image|>",
        },
    }
    write_json(folder, files)


def config(ids: dict[str, int]) -> dict[str, Any]:
    """The model's `config.json`."""
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "torch_dtype": "bfloat16",
        "boi_token_index": ids["<|image_start|>"],
        "eoi_token_index": ids["<|image_end|>"],
        "image_token_index": ids["<|patch|>"],
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "llama4_text",
            **text_config(ids, VOCABULARY, expert=128, dense=512, experts=16, rope=[1, 1, 1, 0]),
        },
        "vision_config": {
            "model_type": "llama4_vision_model",
            "hidden_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 512,
            "image_size": TILE,
            "patch_size": PATCH,
            "num_channels": 3,
            "pixel_shuffle_ratio": 0.5,
            "projector_input_dim": 256,
            "projector_output_dim": 256,
            "vision_output_dim": 256,
            "hidden_act": "gelu",
            "norm_eps": 1e-5,
            "rope_theta": 10000.0,
        },
    }


def _texts() -> Iterator[str]:
    for family in FAMILIES:
        for sample in make(family, 400, seed=0, split="train"):
            for message in sample.conversation:
                yield message["role"]
                yield "".join(part.get("text", "") for part in message["content"])
                yield "\n\n"
