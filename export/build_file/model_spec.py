"""What a runtime needs to know of a checkpoint's config."""

from __future__ import annotations

from arriero.graphs.config import ModelConfig
from arriero.runtimes.backend import LayerSpec, ModelSpec, VisionSpec


def model_spec(config: ModelConfig) -> ModelSpec:
    """The runtime's facts of a checkpoint's config."""
    text, vision = config.text, config.vision
    return ModelSpec(
        model_type="llama4_text" if config.text_only else "llama4",
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        num_attention_heads=text.heads,
        num_key_value_heads=text.kv_heads,
        head_dim=text.head_dim,
        num_local_experts=text.experts,
        num_experts_per_tok=text.experts_per_token,
        attention_chunk_size=text.chunk,
        max_position_embeddings=text.max_positions,
        layers=tuple(
            LayerSpec("chunked" if layer.chunked else "global", "moe" if layer.moe else "dense")
            for layer in text.layers
        ),
        vision=None if vision is None else VisionSpec(vision.image_size, vision.patch_size, vision.tokens_per_tile),
        image_token_id=config.image_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_ids=config.eos_token_ids,
    )
