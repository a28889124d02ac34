"""What the folders of all embedded models have alike: tokenizer, chat template, and most of the text model's shape."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

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


def write_tokenizer(folder: Path, texts: Iterable[str], vocabulary: int) -> dict[str, int]:
    """Write a tokenizer for `texts` of `vocabulary` tokens, its settings and the chat template into `folder`.

    Gives the ids of its `SPECIAL` tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # A tokenizer that is there stays: weights trained on its ids would mean nothing under another one.
    if not (folder / "tokenizer.json").exists():
        train_tokenizer(texts, vocabulary).save(str(folder / "tokenizer.json"))
    known = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    ids = {name: known[name] for name in SPECIAL}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot|>",
        "pad_token": "<|end_of_text|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    generation = {"bos_token_id": ids["<|begin_of_text|>"], "eos_token_id": [ids["<|eot|>"]]}
    write_json(folder, {"generation_config.json": generation, "tokenizer_config.json": settings})
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return ids


def write_json(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Write each of `files` by its name."""
    for name, data in files.items():
        (folder / name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


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


def text_config(
    ids: Mapping[str, int], vocabulary: int, *, expert: int, dense: int, experts: int, rope: Sequence[int]
) -> dict[str, Any]:
    """The text model's configuration, but for its type: widths of experts and dense layers, and which layers rotate."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": 256,
        "intermediate_size": expert,
        "intermediate_size_mlp": dense,
        "num_hidden_layers": len(rope),
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_local_experts": experts,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "no_rope_layers": list(rope),
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
