"""Meta's params.json as config.json would have it. What the file does not say, the tensors' shapes do.

The contexts are those of the released instruct models, which no file states.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arriero.errors import ArrieroError
from arriero.graphs.names import EMBEDDING
from arriero.graphs.sources.meta_params import REMEDY, MetaParams, ScaledRope
from arriero.graphs.sources.tower_config import ADAPTER, with_tower
from arriero.graphs.sources.weight_source import WeightSource

CONTEXTS = {16: 10 << 20, 128: 1 << 20}  # by the number of experts
DENSE_CONTEXT = 8192
ORIGINAL_CONTEXT = 8192  # before RoPE was stretched
BEGIN, PAD, PATCH = "<|begin_of_text|>", "<|finetune_right_pad|>", "<|patch|>"
CLOSING = ("<|end_of_text|>", "<|eom|>", "<|eot|>")


def config_of(
    params: MetaParams, tensors: Mapping[str, WeightSource], ids: Mapping[str, int], where: str
) -> dict[str, Any]:
    """The config of a model with these `tensors`, by canonical name, and the `ids` of its control tokens.

    Raises ArrieroError where the tensors are not of the sizes that `params`, of the file `where`, say.
    """
    vocabulary, layers = tensors[EMBEDDING].shape[0], range(params.layers)
    _check_size(params.vocab_size, vocabulary, f"{where}:vocab_size")
    expert_width = _rows(tensors, "feed_forward.shared_expert.gate_proj.weight")
    dense_width = _rows(tensors, "feed_forward.gate_proj.weight")
    interval = params.nope_interval
    text = {
        "model_type": "llama4_text",
        "vocab_size": vocabulary,
        "hidden_size": params.dim,
        "intermediate_size": expert_width or dense_width,
        "intermediate_size_mlp": dense_width or expert_width,
        "num_hidden_layers": params.layers,
        "num_attention_heads": params.heads,
        "num_key_value_heads": params.kv_heads,
        "head_dim": params.head_dim,
        "num_local_experts": params.experts or 1,
        "num_experts_per_tok": params.experts_per_token,
        "moe_layers": [*layers[params.moe_step - 1 :: params.moe_step]] if params.experts else [],
        "no_rope_layers": [int(interval is None or (layer + 1) % interval != 0) for layer in layers],
        "attention_chunk_size": params.chunk,
        "use_qk_norm": params.qk_norm,
        "attn_temperature_tuning": params.temperature_tuning,
        "floor_scale": params.floor_scale,
        "attn_scale": params.attn_scale,
        "rope_theta": params.rope_theta,
        "rope_scaling": None if params.scaled_rope is None else _rope_scaling(params.scaled_rope),
        "rms_norm_eps": params.norm_eps,
        "max_position_embeddings": CONTEXTS.get(params.experts, DENSE_CONTEXT),
        "tie_word_embeddings": False,
        "bos_token_id": ids.get(BEGIN),
        "eos_token_id": [ids[token] for token in CLOSING if token in ids],
        "pad_token_id": ids.get(PAD),
    }
    tower = params.tower
    if tower is None:
        return text
    _check_size(tower.output_dim, tensors[ADAPTER].shape[0], f"{where}:vision_args.output_dim")
    return with_tower(
        text,
        tensors,
        ids.get(PATCH),
        hidden_size=tower.dim,
        layers=tower.layers,
        heads=tower.heads,
        image_size=tower.image_size,
        patch_size=tower.patch_size,
        shuffle=tower.shuffle,
    )


def _check_size(stated: int | None, stored: int, where: str) -> None:
    if stated not in (None, stored):
        what = f"is {stated}, and the tensors have {stored}"
        raise ArrieroError(what, where=where, expected=str(stored), remedy=REMEDY)


def _rows(tensors: Mapping[str, WeightSource], ending: str) -> int:
    return next((source.shape[0] for name, source in tensors.items() if name.endswith(ending)), 0)


def _rope_scaling(scaled: ScaledRope) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": scaled.factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": scaled.high_freq_factor,
        "original_max_position_embeddings": ORIGINAL_CONTEXT,
    }
