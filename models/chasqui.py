"""The embedded model "chasqui": Scout's shape in small, as a Hugging Face checkpoint folder without weights.

4 layers (3 chunked RoPE, 1 NoPE with temperature tuning), chunk 128, QK-norm, 16 experts top-1 + shared expert,
8 query and 2 key/value heads, a 3-layer vision tower with pixel shuffle and projector.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from arriero.profiles.data import FAMILIES, make

VOCABULARY = 1024
SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|eot|>",
    "<|image_start|>",
    "<|image_end|>",
    "<|image|>",
    "<|patch|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
)
# One digit a token, words with their leading space, punctuation, line ends.
PIECES = r"[^\S\r\n]?\p{L}+|\p{N}|[^\S\r\n]?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+"
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|header_start|>' + message['role'] + '<|header_end|>\\n\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for part in message['content'] %}
            {{- '<|image|>' if part['type'] == 'image' else part['text'] }}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header_start|>assistant<|header_end|>\\n\\n' }}
{%- endif %}
"""
TILE = 64
PATCH = 8


def write_skeleton(folder: Path) -> Tokenizer:
    """Write everything of the checkpoint but its weights into `folder`; gives the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    # A tokenizer that is there stays: weights trained on its ids would mean nothing under another one.
    if not (folder / "tokenizer.json").exists():
        train_tokenizer(_texts(), VOCABULARY).save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    vocabulary = tokenizer.get_vocab()
    ids = {name: vocabulary[name] for name in SPECIAL}
    files: dict[str, dict[str, Any]] = {
        "config.json": config(ids),
        "generation_config.json": {"bos_token_id": ids["<|begin_of_text|>"], "eos_token_id": [ids["<|eot|>"]]},
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
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot|>",
            "pad_token": "<|end_of_text|>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 4096,
        },
    }
    for name, data in files.items():
        (folder / name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return tokenizer


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
            "vocab_size": VOCABULARY,
            "hidden_size": 256,
            "intermediate_size": 128,
            "intermediate_size_mlp": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_local_experts": 16,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1,
            "no_rope_layers": [1, 1, 1, 0],
            "attention_chunk_size": 128,
            "use_qk_norm": True,
            "attn_temperature_tuning": True,
            "floor_scale": 128,
            "attn_scale": 0.1,
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "hidden_act": "silu",
            "attention_bias": False,
            "bos_token_id": ids["<|begin_of_text|>"],
            "eos_token_id": ids["<|eot|>"],
            "pad_token_id": ids["<|end_of_text|>"],
            "tie_word_embeddings": False,
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


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE over `texts`, and tokens that are reserved where these give fewer than `vocabulary`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    reserved = vocabulary - tokenizer.get_vocab_size() - len(SPECIAL)
    names = [*SPECIAL, *(f"<|reserved_{number}|>" for number in range(reserved))]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return tokenizer


def _texts() -> Iterator[str]:
    for family in FAMILIES:
        for sample in make(family, 400, seed=0, split="train"):
            for message in sample.conversation:
                yield message["role"]
                yield "".join(part.get("text", "") for part in message["content"])
                yield "\n\n"
