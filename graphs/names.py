"""The only file that knows checkpoint tensor names: Hugging Face's, in their multimodal form."""

from __future__ import annotations

from arriero.graphs.config import ModelConfig

TEXT_PREFIX = "language_model."
EMBEDDING = f"{TEXT_PREFIX}model.embed_tokens.weight"
HEAD = f"{TEXT_PREFIX}lm_head.weight"
RENAMED = {  # the first that fits
    "model.language_model.": f"{TEXT_PREFIX}model.",
    "model.vision_model.": "vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.": f"{TEXT_PREFIX}model.",
    "lm_head.": f"{TEXT_PREFIX}lm_head.",
}


def canonical_name(raw: str) -> str:
    """The multimodal name of a tensor that a file calls `raw`.

    Text-only checkpoints, and some tools, leave `language_model.` away; others put `model.` before everything.
    """
    for prefix, canonical in RENAMED.items():
        if raw.startswith(prefix):
            return canonical + raw.removeprefix(prefix)
    return raw


def expert_tensors(layer: int) -> tuple[str, str]:
    """Names of the gate|up and the down weights of a MoE layer's experts."""
    prefix = f"{TEXT_PREFIX}model.layers.{layer}.feed_forward.experts"
    return f"{prefix}.gate_up_proj", f"{prefix}.down_proj"


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor that a checkpoint of `config` must hold, once each."""
    # Imported here because reading names and headers must not cost the second that importing torch takes.
    import torch

    from arriero.graphs.model import Llama4

    with torch.device("meta"):
        model = Llama4(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
