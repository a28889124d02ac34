"""What llama.cpp calls the tensors of a Llama 4, in a model's file and in that of its vision tower.

Source: the name tables of the `gguf` package. A stack of experts is one tensor for gate and one for up there.
"""

from __future__ import annotations

import re

from arriero.graphs.names import TEXT_PREFIX

TEXT = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_gate.weight": "feed_forward.gate_proj.weight",
    "ffn_up.weight": "feed_forward.up_proj.weight",
    "ffn_down.weight": "feed_forward.down_proj.weight",
    "ffn_gate_inp.weight": "feed_forward.router.weight",
    "ffn_gate_shexp.weight": "feed_forward.shared_expert.gate_proj.weight",
    "ffn_up_shexp.weight": "feed_forward.shared_expert.up_proj.weight",
    "ffn_down_shexp.weight": "feed_forward.shared_expert.down_proj.weight",
}
# Stacks [E, N, K], whose experts are put together as those that other tools store one by one.
EXPERTS = {
    "ffn_gate_exps.weight": "gate_proj",
    "ffn_up_exps.weight": "up_proj",
    "ffn_down_exps.weight": "down_proj",
}
VISION = {
    "v.class_embd": "vision_model.class_embedding",
    "v.patch_embd.weight": "vision_model.patch_embedding.linear.weight",
    "v.position_embd.weight": "vision_model.positional_embedding_vlm",
    "v.pre_ln.weight": "vision_model.layernorm_pre.weight",
    "v.pre_ln.bias": "vision_model.layernorm_pre.bias",
    "v.post_ln.weight": "vision_model.layernorm_post.weight",
    "v.post_ln.bias": "vision_model.layernorm_post.bias",
    "mm.model.mlp.1.weight": "vision_model.vision_adapter.mlp.fc1.weight",
    "mm.model.mlp.2.weight": "vision_model.vision_adapter.mlp.fc2.weight",
    "mm.model.fc.weight": "multi_modal_projector.linear_1.weight",
}
VISION_LAYER = {
    "ln1": "input_layernorm",
    "ln2": "post_attention_layernorm",
    "attn_post_norm": "post_attention_layernorm",  # the later name of ln2
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}
ROPE_FACTORS = "rope_freqs.weight"
BLOCK = re.compile(r"(?P<tower>v\.)?blk\.(?P<layer>\d+)\.(?P<rest>.+)")


def canonical_name(name: str) -> str | None:
    """The name that we have for a tensor; None for one that no Llama 4 has. Of experts, that of the stack's matrix."""
    if (match := BLOCK.fullmatch(name)) is None:
        return VISION[name] if name in VISION else f"{TEXT_PREFIX}{TEXT[name]}" if name in TEXT else None
    layer, rest = match["layer"], match["rest"]
    if match["tower"]:
        stem, _, leaf = rest.rpartition(".")
        return f"vision_model.model.layers.{layer}.{VISION_LAYER[stem]}.{leaf}" if stem in VISION_LAYER else None
    prefix = f"{TEXT_PREFIX}model.layers.{layer}."
    if rest in EXPERTS:
        return f"{prefix}feed_forward.experts.{EXPERTS[rest]}"
    return f"{prefix}{LAYER[rest]}" if rest in LAYER else None
