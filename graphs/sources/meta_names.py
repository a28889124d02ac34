"""What Meta's own files call the tensors of a Llama 4, and how each is divided among the files of a checkpoint.

Source: `llama_models.llama4` and its load hooks. Model-parallel files hold a part of the rows (outputs) of some
matrices, a part of the columns (inputs) of others, and the same copy of the rest.
"""

from __future__ import annotations

import re
from enum import Enum

from arriero.graphs.names import TEXT_PREFIX


class Split(Enum):
    """How the files divide a tensor."""

    SAME = "every file has all of it"
    ROWS = "by its first axis"
    COLUMNS = "by its second axis"
    QKV = "queries, keys and values, each by its rows, one after another in a file"
    GATE_UP = "gate and up of a dense layer, each by its rows, one after another in a file"
    EXPERT_IN = "a stack [E*H, F] by the width of the experts"
    EXPERT_OUT = "a stack [E*F, H] by the width of the experts"
    TURNED = "every file has all of it, inputs first"


_LAYER = rf"{TEXT_PREFIX}model.layers.\1."
_BLOCK = r"vision_model.model.layers.\1."
_ENCODER = r"vision_embeddings\.vision_encoder\."
_RESBLOCK = rf"{_ENCODER}transformer\.resblocks\.(\d+)\."
NAMES: dict[str, tuple[str, Split]] = {
    r"tok_embeddings\.weight": (f"{TEXT_PREFIX}model.embed_tokens.weight", Split.ROWS),
    r"output\.weight": (f"{TEXT_PREFIX}lm_head.weight", Split.ROWS),
    r"norm\.weight": (f"{TEXT_PREFIX}model.norm.weight", Split.SAME),
    r"layers\.(\d+)\.attention(?:_norm\.|\.wqkv\.layer_norm_)weight": (f"{_LAYER}input_layernorm.weight", Split.SAME),
    r"layers\.(\d+)\.(?:ffn_norm\.weight|feed_forward\.norm\.weight|feed_forward\.mlp\.layer_norm_weight)": (
        f"{_LAYER}post_attention_layernorm.weight",
        Split.SAME,
    ),
    r"layers\.(\d+)\.attention\.wqkv\.weight": (f"{_LAYER}self_attn", Split.QKV),
    r"layers\.(\d+)\.attention\.wq\.weight": (f"{_LAYER}self_attn.q_proj.weight", Split.ROWS),
    r"layers\.(\d+)\.attention\.wk\.weight": (f"{_LAYER}self_attn.k_proj.weight", Split.ROWS),
    r"layers\.(\d+)\.attention\.wv\.weight": (f"{_LAYER}self_attn.v_proj.weight", Split.ROWS),
    r"layers\.(\d+)\.attention\.wo\.weight": (f"{_LAYER}self_attn.o_proj.weight", Split.COLUMNS),
    r"layers\.(\d+)\.feed_forward\.router_DE": (f"{_LAYER}feed_forward.router.weight", Split.TURNED),
    r"layers\.(\d+)\.feed_forward\.w_in_shared_FD\.weight": (
        f"{_LAYER}feed_forward.shared_expert.gate_proj.weight",
        Split.ROWS,
    ),
    r"layers\.(\d+)\.feed_forward\.w_swiglu_FD\.weight": (
        f"{_LAYER}feed_forward.shared_expert.up_proj.weight",
        Split.ROWS,
    ),
    r"layers\.(\d+)\.feed_forward\.w_out_shared_DF\.weight": (
        f"{_LAYER}feed_forward.shared_expert.down_proj.weight",
        Split.COLUMNS,
    ),
    r"layers\.(\d+)\.feed_forward\.experts\.moe_w_in_eD_F": (f"{_LAYER}feed_forward.experts.gate", Split.EXPERT_IN),
    r"layers\.(\d+)\.feed_forward\.experts\.moe_w_swiglu_eD_F": (f"{_LAYER}feed_forward.experts.up", Split.EXPERT_IN),
    r"layers\.(\d+)\.feed_forward\.experts\.moe_w_out_eF_D": (
        f"{_LAYER}feed_forward.experts.down_proj",
        Split.EXPERT_OUT,
    ),
    r"layers\.(\d+)\.feed_forward\.mlp\.fc1_weight": (f"{_LAYER}feed_forward", Split.GATE_UP),
    r"layers\.(\d+)\.feed_forward\.w1\.weight": (f"{_LAYER}feed_forward.gate_proj.weight", Split.ROWS),
    r"layers\.(\d+)\.feed_forward\.w3\.weight": (f"{_LAYER}feed_forward.up_proj.weight", Split.ROWS),
    r"layers\.(\d+)\.feed_forward\.(?:mlp\.fc2_weight|w2\.weight)": (
        f"{_LAYER}feed_forward.down_proj.weight",
        Split.COLUMNS,
    ),
    r"vision_projection\.weight": ("multi_modal_projector.linear_1.weight", Split.ROWS),
    r"vision_embeddings\.vision_adapter\.mlp\.c_fc\.weight": ("vision_model.vision_adapter.mlp.fc1.weight", Split.ROWS),
    r"vision_embeddings\.vision_adapter\.mlp\.c_proj\.weight": (
        "vision_model.vision_adapter.mlp.fc2.weight",
        Split.COLUMNS,
    ),
    rf"{_ENCODER}conv1\._linear\.weight": ("vision_model.patch_embedding.linear.weight", Split.ROWS),
    rf"{_ENCODER}class_embedding": ("vision_model.class_embedding", Split.SAME),
    rf"{_ENCODER}positional_embedding_vlm": ("vision_model.positional_embedding_vlm", Split.SAME),
    rf"{_ENCODER}ln_(pre|post)\.(weight|bias)": (r"vision_model.layernorm_\1.\2", Split.SAME),
    rf"{_RESBLOCK}ln_1\.(weight|bias)": (rf"{_BLOCK}input_layernorm.\2", Split.SAME),
    rf"{_RESBLOCK}ln_2\.(weight|bias)": (rf"{_BLOCK}post_attention_layernorm.\2", Split.SAME),
    rf"{_RESBLOCK}attn\.w([qkv])\.(weight|bias)": (rf"{_BLOCK}self_attn.\2_proj.\3", Split.ROWS),
    rf"{_RESBLOCK}attn\.wo\.weight": (f"{_BLOCK}self_attn.o_proj.weight", Split.COLUMNS),
    rf"{_RESBLOCK}attn\.wo\.bias": (f"{_BLOCK}self_attn.o_proj.bias", Split.SAME),
    rf"{_RESBLOCK}mlp\.c_fc\.(weight|bias)": (rf"{_BLOCK}mlp.fc1.\2", Split.ROWS),
    rf"{_RESBLOCK}mlp\.c_proj\.weight": (f"{_BLOCK}mlp.fc2.weight", Split.COLUMNS),
    rf"{_RESBLOCK}mlp\.c_proj\.bias": (f"{_BLOCK}mlp.fc2.bias", Split.SAME),
}
# Tables and statistics of training that no inference reads.
UNUSED = re.compile(r".*(rope\.freqs|freqs?_cis|_extra_state|expert_activation_DE|(running|global)_gate_stats_3E)")


def canonical_name(name: str) -> tuple[str, Split] | None:
    """Our name for a tensor, and how the files divide it; None for one that no Llama 4 has."""
    for pattern, (canonical, split) in NAMES.items():
        if (match := re.fullmatch(pattern, name)) is not None:
            return match.expand(canonical), split
    return None
