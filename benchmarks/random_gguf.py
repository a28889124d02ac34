"""A GGUF file of a released shape with random weights, for llama.cpp's speed beside ours where no checkpoint would fit.

    python benchmarks/random_gguf.py maverick:4 maverick-4.gguf

The first layers at their true widths with the whole vocabulary: matrices as Q4_0, the head as Q8_0, router and norms as
float32. Codes are drawn, scales are all alike, and there is no tokenizer: `llama-bench` asks for none. What it computes
is garbage; what it reads, and how often, is what the released model would read. Needs `pip install 'arriero[gguf]'`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from rich.progress import track

from arriero.graphs.sources.released_configs import released_config

ARCHITECTURE = "llama4"
SCALE = 0.002  # of every block of codes,
TABLE_SCALE = 0.1  # and of the embedding's: what a token is, and so its experts, is not lost in what its layers add
LEAST_LAYERS = 4  # the fourth is the first NoPE layer; llama.cpp 0.25.3 aborts without one, whose tempering it sets
Q4, Q8, F32 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0, GGMLQuantizationType.F32
TABLE = "token_embd.weight"
Shape = tuple[int, ...]


def tensors(text: dict[str, Any], layers: int) -> Iterator[tuple[str, Shape, GGMLQuantizationType]]:
    """Name, shape (outputs before inputs) and type of each tensor of the first `layers` of a text model."""
    hidden, vocabulary = text["hidden_size"], text["vocab_size"]
    heads, groups = (text[name] * text["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    experts, width, dense = text["num_local_experts"], text["intermediate_size"], text["intermediate_size_mlp"]
    yield TABLE, (vocabulary, hidden), Q4
    yield "output_norm.weight", (hidden,), F32
    yield "output.weight", (vocabulary, hidden), Q8
    for layer in range(layers):
        block = f"blk.{layer}"
        for name, outputs, inputs in (
            ("attn_q", heads, hidden),
            ("attn_k", groups, hidden),
            ("attn_v", groups, hidden),
            ("attn_output", hidden, heads),
        ):
            yield f"{block}.{name}.weight", (outputs, inputs), Q4
        for name in ("attn_norm", "ffn_norm"):
            yield f"{block}.{name}.weight", (hidden,), F32
        if (layer + 1) % text["interleave_moe_layer_step"]:
            stacks: list[tuple[str, Shape, int]] = [("", (), dense)]
        else:
            yield f"{block}.ffn_gate_inp.weight", (experts, hidden), F32
            stacks = [("_exps", (experts,), width), ("_shexp", (), width)]
        for suffix, stack, size in stacks:
            for name, matrix in (("gate", (size, hidden)), ("up", (size, hidden)), ("down", (hidden, size))):
                yield f"{block}.ffn_{name}{suffix}.weight", (*stack, *matrix), Q4


def draw(random: np.random.Generator, shape: Shape, kind: GGMLQuantizationType, scale: float) -> np.ndarray:
    """Random contents, the last axis in bytes where they are blocks of codes."""
    if kind == F32:
        return np.full(shape, 1.0, np.float32) if len(shape) == 1 else random.standard_normal(shape, np.float32)
    values, size = GGML_QUANT_SIZES[kind]
    # Drawn once and repeated: an expert's bytes are as far apart in memory as any others. Without codes whose negative
    # there is not, since a mean that all weights have would send every token to the same experts.
    if kind == Q4:
        low, high = random.integers(1, 16, (2, 1 << 16, size), np.uint8)
        blocks = low | high << 4
    else:
        blocks = random.integers(-127, 128, (1 << 16, size), np.int8).view(np.uint8)
    blocks[:, :2] = np.array([scale], np.float16).view(np.uint8)
    count = int(np.prod(shape)) // values
    codes = np.resize(blocks, (count, size))
    return codes.reshape(*shape[:-1], shape[-1] // values * size)


def write(path: Path, name: str, layers: int) -> None:
    """Write the file, tensor by tensor."""
    text = released_config(name)["text_config"]
    writer = GGUFWriter(path, ARCHITECTURE)
    writer.add_block_count(layers)
    writer.add_context_length(8192)
    writer.add_embedding_length(text["hidden_size"])
    writer.add_vocab_size(text["vocab_size"])
    writer.add_feed_forward_length(text["intermediate_size_mlp"])
    writer.add_expert_feed_forward_length(text["intermediate_size"])
    writer.add_interleave_moe_layer_step(text["interleave_moe_layer_step"])
    writer.add_expert_count(text["num_local_experts"])
    writer.add_expert_used_count(text["num_experts_per_tok"])
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv(text["num_key_value_heads"])
    writer.add_key_length(text["head_dim"])
    writer.add_value_length(text["head_dim"])
    writer.add_rope_dimension_count(text["head_dim"])
    writer.add_rope_freq_base(text["rope_theta"])
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_tokenizer_model("no_vocab")
    every = list(tensors(text, layers))
    for tensor, shape, kind in every:
        values, size = GGML_QUANT_SIZES[kind]
        stored = np.dtype(np.float32 if kind == F32 else np.uint8)
        nbytes = int(np.prod(shape)) // values * size
        own = shape if kind == F32 else (*shape[:-1], shape[-1] // values * size)
        writer.add_tensor_info(tensor, own, stored, nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(0)
    for tensor, shape, kind in track(every, description=path.name):
        writer.write_tensor_data(draw(random, shape, kind, TABLE_SCALE if tensor == TABLE else SCALE))
    writer.close()


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="NAME:LAYERS, such as maverick:4")
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    name, _, layers = options.model.partition(":")
    if int(layers) < LEAST_LAYERS:
        raise SystemExit(f"{options.model}: llama.cpp computes no Llama 4 of fewer than {LEAST_LAYERS} layers")
    write(options.file, name, int(layers))


if __name__ == "__main__":
    main()
