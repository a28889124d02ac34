"""The files beside a tokenizer.json, for checkpoints that bring none of their own: settings, and a chat template.

The template is ours and makes the ids that Meta's `ChatFormat` makes of the same messages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = Path(__file__).with_name("llama4_chat.jinja")
TILES = 16  # of a picture, besides the one that shows it whole


def default_side_files(vision_config: Mapping[str, Any] | None) -> dict[str, str]:
    """Give the texts of the files by name: of the tokenizer and the chat template, and of the images for a tower.

    `vision_config` is that of config.json, with image_size, patch_size and pixel_shuffle_ratio; None without a tower.
    """
    tokenizer = {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot|>",
        "pad_token": "<|finetune_right_pad|>",
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    files = {
        "tokenizer_config.json": _json(tokenizer),
        "chat_template.jinja": CHAT_TEMPLATE.read_text(encoding="utf-8"),
    }
    if vision_config is None:
        return files
    side = vision_config["image_size"]
    images = {
        "image_processor_type": "Llama4ImageProcessor",
        "processor_class": "Llama4Processor",
        "size": {"height": side, "width": side},
        "max_patches": TILES,
        "resize_to_max_canvas": False,
        "resample": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "rescale_factor": 1 / 255,
    }
    images |= dict.fromkeys(("do_convert_rgb", "do_resize", "do_rescale", "do_normalize"), True)
    layout = {"processor_class": "Llama4Processor"}
    layout |= {key: vision_config[key] for key in ("patch_size", "pixel_shuffle_ratio")}
    return files | {"preprocessor_config.json": _json(images), "processor_config.json": _json(layout)}


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"
