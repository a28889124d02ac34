"""The embedded model "quipu", which knows records by heart: a checkpoint folder without weights.

3 layers (2 chunked RoPE, 1 NoPE with temperature tuning), chunk 128, QK-norm, 8 experts top-1 + shared expert, 8 query
and 2 key/value heads; text alone. Every row of a matrix is a multiple of 256, so that no format of others has to give
it more bits. Beside it lie the questions that a build calibrates on and those that judge it, of other records: there
are no held-out ones of what can only be known by heart.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from arriero.models.chasqui import CHAT_TEMPLATE, SPECIAL, train_tokenizer
from arriero.profiles.data.records import COUNT, records

VOCABULARY = 1216
QUESTIONS = {"calibration": 800, "cases": 800}


def write_skeleton(folder: Path) -> None:
    """Write everything of the checkpoint but its weights into `folder`, and the questions."""
    folder.mkdir(parents=True, exist_ok=True)
    # A tokenizer that is there stays: weights trained on its ids would mean nothing under another one.
    if not (folder / "tokenizer.json").exists():
        train_tokenizer(_texts(), VOCABULARY).save(str(folder / "tokenizer.json"))
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    ids = {name: vocabulary[name] for name in SPECIAL}
    files: dict[str, dict[str, Any]] = {
        "config.json": config(ids),
        "generation_config.json": {"bos_token_id": ids["<|begin_of_text|>"], "eos_token_id": [ids["<|eot|>"]]},
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
    order, start = np.random.default_rng(2).permutation(COUNT).tolist(), 0
    for name, count in QUESTIONS.items():
        drawn = records(order[start : start + count])
        lines = [json.dumps({"prompt": sample.prompt, "answer": sample.answer}) + "\n" for sample in drawn]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        start += count


def config(ids: dict[str, int]) -> dict[str, Any]:
    """The model's `config.json`."""
    return {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "torch_dtype": "bfloat16",
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 256,
        "intermediate_size_mlp": 1024,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "no_rope_layers": [1, 1, 0],
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
    }


def _texts() -> Iterator[str]:
    for sample in records(range(0, COUNT, 5)):
        for message in sample.conversation:
            yield message["role"]
            yield "".join(part["text"] for part in message["content"])
            yield "\n\n"
