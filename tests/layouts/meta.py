"""Meta's own files, as its checkpoints are divided among model-parallel ranks."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from tests.layouts.split_experts import load

KINDS = ("1", "2")
IDS = {"ln_pre": "layernorm_pre", "ln_post": "layernorm_post"}


def write(source: Path, folder: Path, kind: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Write the checkpoint `source` as `kind` files of Meta's; gives every weight by Hugging Face's name."""
    folder.mkdir(parents=True, exist_ok=True)
    model, ranks = load(source, dtype), int(kind)
    config = json.loads((source / "config.json").read_text())
    text, state = config.get("text_config", config), model.state_dict()
    shards: list[dict[str, Any]] = [{} for _ in range(ranks)]

    def divide(name: str, value: torch.Tensor, axis: int | None) -> None:
        parts = [value] * ranks if axis is None else value.chunk(ranks, axis)
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part.clone()

    prefix = "language_model." if "text_config" in config else ""
    divide("tok_embeddings.weight", state[f"{prefix}model.embed_tokens.weight"], 0)
    divide("output.weight", state[f"{prefix}lm_head.weight"], 0)
    divide("norm.weight", state[f"{prefix}model.norm.weight"], None)
    for layer in range(text["num_hidden_layers"]):
        _add_layer(shards, divide, state, f"{prefix}model.layers.{layer}.", f"layers.{layer}.")
    if "vision_config" in config:
        _add_vision(divide, state, config["vision_config"])
    for rank, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{rank:02}.pth")
    (folder / "params.json").write_text(json.dumps(_params(text, config.get("vision_config"))))
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    return {name: value for name, value in state.items() if value.is_floating_point()}


def _add_layer(shards: list[dict[str, Any]], divide: Any, state: Any, ours: str, theirs: str) -> None:
    ranks = len(shards)
    divide(f"{theirs}attention.wqkv.layer_norm_weight", state[f"{ours}input_layernorm.weight"], None)
    parts = [state[f"{ours}self_attn.{letter}_proj.weight"].chunk(ranks) for letter in "qkv"]
    for rank, shard in enumerate(shards):
        shard[f"{theirs}attention.wqkv.weight"] = torch.cat([part[rank] for part in parts])
        shard[f"{theirs}attention.wqkv._extra_state"] = io.BytesIO()
    divide(f"{theirs}attention.wo.weight", state[f"{ours}self_attn.o_proj.weight"], 1)
    inner = f"{ours}feed_forward."
    if f"{inner}router.weight" not in state:
        divide(f"{theirs}feed_forward.mlp.layer_norm_weight", state[f"{ours}post_attention_layernorm.weight"], None)
        halves = [state[f"{inner}{matrix}_proj.weight"].chunk(ranks) for matrix in ("gate", "up")]
        for rank, shard in enumerate(shards):
            shard[f"{theirs}feed_forward.mlp.fc1_weight"] = torch.cat([half[rank] for half in halves])
        divide(f"{theirs}feed_forward.mlp.fc2_weight", state[f"{inner}down_proj.weight"], 1)
        return
    divide(f"{theirs}feed_forward.norm.weight", state[f"{ours}post_attention_layernorm.weight"], None)
    divide(f"{theirs}feed_forward.router_DE", state[f"{inner}router.weight"].T, None)
    divide(f"{theirs}feed_forward.w_in_shared_FD.weight", state[f"{inner}shared_expert.gate_proj.weight"], 0)
    divide(f"{theirs}feed_forward.w_swiglu_FD.weight", state[f"{inner}shared_expert.up_proj.weight"], 0)
    divide(f"{theirs}feed_forward.w_out_shared_DF.weight", state[f"{inner}shared_expert.down_proj.weight"], 1)
    gate, up = state[f"{inner}experts.gate_up_proj"].chunk(2, -1)
    down = state[f"{inner}experts.down_proj"]
    stacks = (("moe_w_in_eD_F", gate, 2), ("moe_w_swiglu_eD_F", up, 2), ("moe_w_out_eF_D", down, 1))
    for name, stack, axis in stacks:
        for shard, part in zip(shards, stack.chunk(ranks, axis), strict=True):
            shard[f"{theirs}feed_forward.experts.{name}"] = part.reshape(-1, part.shape[-1]).clone()


def _add_vision(divide: Any, state: Any, vision: dict[str, Any]) -> None:
    encoder = "vision_embeddings.vision_encoder."
    divide(f"{encoder}conv1._linear.weight", state["vision_model.patch_embedding.linear.weight"], 0)
    for name in ("class_embedding", "positional_embedding_vlm"):
        divide(f"{encoder}{name}", state[f"vision_model.{name}"], None)
    for leaf in ("weight", "bias"):
        for theirs, ours in IDS.items():
            divide(f"{encoder}{theirs}.{leaf}", state[f"vision_model.{ours}.{leaf}"], None)
        for layer in range(vision["num_hidden_layers"]):
            block, own = f"{encoder}transformer.resblocks.{layer}.", f"vision_model.model.layers.{layer}."
            for letter in "qkv":
                divide(f"{block}attn.w{letter}.{leaf}", state[f"{own}self_attn.{letter}_proj.{leaf}"], 0)
            divide(f"{block}attn.wo.{leaf}", state[f"{own}self_attn.o_proj.{leaf}"], 1 if leaf == "weight" else None)
            divide(f"{block}mlp.c_fc.{leaf}", state[f"{own}mlp.fc1.{leaf}"], 0)
            divide(f"{block}mlp.c_proj.{leaf}", state[f"{own}mlp.fc2.{leaf}"], 1 if leaf == "weight" else None)
            divide(f"{block}ln_1.{leaf}", state[f"{own}input_layernorm.{leaf}"], None)
            divide(f"{block}ln_2.{leaf}", state[f"{own}post_attention_layernorm.{leaf}"], None)
    divide("vision_embeddings.vision_adapter.mlp.c_fc.weight", state["vision_model.vision_adapter.mlp.fc1.weight"], 0)
    divide("vision_embeddings.vision_adapter.mlp.c_proj.weight", state["vision_model.vision_adapter.mlp.fc2.weight"], 1)
    divide("vision_projection.weight", state["multi_modal_projector.linear_1.weight"], 0)


def _params(text: dict[str, Any], vision: dict[str, Any] | None) -> dict[str, Any]:
    params = {
        "dim": text["hidden_size"],
        "n_layers": text["num_hidden_layers"],
        "n_heads": text["num_attention_heads"],
        "n_kv_heads": text["num_key_value_heads"],
        "head_dim": text["head_dim"],
        "norm_eps": text["rms_norm_eps"],
        "rope_theta": text["rope_theta"],
        "use_scaled_rope": bool(text.get("rope_scaling")),
        "attention_chunk_size": text["attention_chunk_size"],
        "nope_layer_interval": 4,
        "use_qk_norm": text["use_qk_norm"],
        "attn_temperature_tuning": text["attn_temperature_tuning"],
        "floor_scale": text["floor_scale"],
        "attn_scale": text["attn_scale"],
        "moe_args": {
            "num_experts": text["num_local_experts"],
            "top_k": text["num_experts_per_tok"],
            "interleave_moe_layer_step": text["interleave_moe_layer_step"],
        },
    }
    if vision is None:
        return params
    square = {"image_size": vision["image_size"], "patch_size": vision["patch_size"]}
    sizes = {name: {"height": side, "width": side} for name, side in square.items()}
    tower = {
        "dim": vision["hidden_size"],
        "n_layers": vision["num_hidden_layers"],
        "n_heads": vision["num_attention_heads"],
        "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
        "output_dim": vision["vision_output_dim"],
        "pixel_shuffle_ratio": vision["pixel_shuffle_ratio"],
    }
    return {**params, "vision_args": {**sizes, **tower}}
