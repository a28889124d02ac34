"""The named groups of a checkpoint's tensors: which names each holds, and why some of them stay exact.

Every tensor of Llama 4 is in one group. A checkpoint need not have all of them: a text checkpoint has no `vision`, a
dense one no `experts`, one with tied embeddings no `head`. Names are the canonical ones of `graphs/names.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

TOWER_LAYERS = r"vision_model\.model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.fc[12])\.weight"
LAYER = r"language_model\.model\.layers\.(?P<layer>\d+)"


@dataclass(frozen=True)
class Group:
    """What a group holds, in words and as a pattern of whole names; and, where most profiles keep it exact, why."""

    holds: str
    names: str
    exact_because: str | None = None


GROUPS: dict[str, Group] = {
    "experts": Group("the routed experts, gate|up and down", rf"{LAYER}\.feed_forward\.experts\.(gate_up|down)_proj"),
    "shared_expert": Group(
        "the expert that every token of a MoE layer passes",
        rf"{LAYER}\.feed_forward\.shared_expert\.(gate|up|down)_proj\.weight",
    ),
    "mlp": Group("the MLP of dense layers", rf"{LAYER}\.feed_forward\.(gate|up|down)_proj\.weight"),
    "attention": Group("query, key, value and output projections", rf"{LAYER}\.self_attn\.[qkvo]_proj\.weight"),
    "router": Group(
        "the matrices that send tokens to experts",
        rf"{LAYER}\.feed_forward\.router\.weight",
        "It decides which expert runs: near ties turn on the last bits, and one flip costs more than its bytes save.",
    ),
    "norms": Group(
        "the scales of the text decoder's RMS norms",
        rf"language_model\.model\.norm\.weight|{LAYER}\.(input|post_attention)_layernorm\.weight",
        "Vectors; they weigh nothing and scale everything, and their sums of squares need float32.",
    ),
    "embeddings": Group(
        "the token embeddings",
        r"language_model\.model\.embed_tokens\.weight",
        "A lookup, not a product; it is stored in the checkpoint's dtype and read row by row.",
    ),
    "head": Group(
        "the matrix that gives the logits",
        r"language_model\.lm_head\.weight",
        "Its rounding goes into the logits undamped.",
    ),
    "vision_layers": Group(
        "the matrices of the vision tower's layers",
        TOWER_LAYERS,
        "They run once per image tile, so they are not on the decode path.",
    ),
    "vision": Group(
        "the rest of the vision tower: patches, positions, norms, biases, adapter",
        rf"(?!{TOWER_LAYERS}$)vision_model\..*",
        "A small part of the tower, which every image feature goes through.",
    ),
    "projector": Group(
        "the matrix from image features to the text decoder",
        r"multi_modal_projector\..*",
        "One small matrix that every image feature goes through.",
    ),
}
# The matrices of decoder layers: calibration sees their inputs, and the head's, and no others'.
LAYER_GROUPS = ("attention", "shared_expert", "mlp", "experts")

_PATTERNS = {name: re.compile(group.names) for name, group in GROUPS.items()}


def group_of(tensor: str) -> str | None:
    """The group that holds `tensor`; None for a name that is none of Llama 4's."""
    return next((name for name, pattern in _PATTERNS.items() if pattern.fullmatch(tensor)), None)


def is_layer_matrix(tensor: str) -> bool:
    """Whether `tensor` is a matrix, or a stack of experts, of a decoder layer."""
    return group_of(tensor) in LAYER_GROUPS


def is_head(tensor: str) -> bool:
    """Whether `tensor` is the matrix that gives the logits."""
    return group_of(tensor) == "head"


def is_table(tensor: str) -> bool:
    """Whether `tensor` is looked up or added by rows: a matrix by its shape, with which nothing is multiplied."""
    return group_of(tensor) == "embeddings" or tensor == "vision_model.positional_embedding_vlm"


def layer_group(tensor: str) -> tuple[int, str]:
    """The decoder layer and the group of one of its matrices."""
    for name in LAYER_GROUPS:
        if match := _PATTERNS[name].fullmatch(tensor):
            return int(match["layer"]), name
    raise ValueError(f"{tensor} is no matrix of a decoder layer")
