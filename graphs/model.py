"""The PyTorch reference of Llama 4's text decoder: explicit positions, explicit KV cache, routed experts only.

Legend: B batch, S new tokens, P past slots, H hidden, N query heads, K key/value heads, D head size, T tokens (B*S),
E experts, k experts per token, V vocabulary. Source of every formula: the Llama 4 model code and `config.json`.
Module and parameter names are those of the Hugging Face checkpoint, so a state dict loads without renaming.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arriero.graphs.config import Layer, ModelConfig, TextConfig
from arriero.graphs.ops import cached_attention, expert_dispatch
from arriero.graphs.rotary import rotate_pairs, rotation_table
from arriero.graphs.vision import Projector, VisionModel

KeyValue = tuple[Tensor, Tensor]


class StepTensors(NamedTuple):
    """What one step gives: `logits` [B, L, V]; per layer present key/value and hidden [B, S, H]; per MoE layer ids."""

    logits: Tensor
    present: list[KeyValue]
    hiddens: list[Tensor]
    expert_ids: list[Tensor]


class Linear(nn.Module):
    """Bias-free linear layer whose stored weight [out, in] may be narrower than the activations."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return F.linear(x, self.weight.to(x.dtype))


class Embedding(nn.Module):
    """Token embedding [V, H], widened to float32 on look-up."""

    def __init__(self, vocab: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, hidden))

    def forward(self, input_ids: Tensor) -> Tensor:
        """[B, S] int64 -> [B, S, H] float32."""
        return F.embedding(input_ids, self.weight).float()


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned gain [H]."""

    def __init__(self, hidden: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(hidden)), eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class MLP(nn.Module):
    """SwiGLU feed-forward: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = Linear(hidden, ffn), Linear(hidden, ffn), Linear(ffn, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """The expert weights of one MoE layer: gate|up [E, H, 2F] and down [E, F, H]."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        experts, hidden, ffn = config.experts, config.hidden_size, config.expert_ffn
        self.gate_up_proj = nn.Parameter(torch.empty(experts, hidden, 2 * ffn))
        self.down_proj = nn.Parameter(torch.empty(experts, ffn, hidden))


class MoE(nn.Module):
    """Top-k routed experts plus the shared expert."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.per_token = config.experts_per_token
        self.router = Linear(config.hidden_size, config.experts)
        self.experts = Experts(config)
        self.shared_expert = MLP(config.hidden_size, config.expert_ffn)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[T, H] -> output [T, H] and chosen expert ids [T, k] int64."""
        expert_id, score = self.route(x)
        routed = expert_dispatch(x, expert_id, score, self.experts.gate_up_proj, self.experts.down_proj)
        return self.shared_expert(x) + routed, expert_id

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[T, H] -> the chosen experts' ids [T, k] int64 and their scores [T, k]."""
        value, expert_id = self.router(x).topk(self.per_token, dim=-1)
        return expert_id, value.sigmoid()


class Attention(nn.Module):
    """Grouped-query attention: rotary + QK-norm on RoPE layers, temperature-tuned queries on NoPE layers."""

    def __init__(self, config: TextConfig, layer: Layer) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        hidden, size = config.hidden_size, config.head_dim
        self.q_proj = Linear(hidden, config.heads * size)
        self.k_proj = Linear(hidden, config.kv_heads * size)
        self.v_proj = Linear(hidden, config.kv_heads * size)
        self.o_proj = Linear(config.heads * size, hidden)

    def forward(
        self, x: Tensor, rotation: KeyValue, past: KeyValue, positions: Tensor, past_positions: Tensor
    ) -> tuple[Tensor, KeyValue]:
        """`x` [B, S, H], `past` key and value [B, K, P, D] -> output [B, S, H] and present key and value."""
        config = self.config
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.layer.rope:
            q, k = (self.rotate_and_norm(t.unflatten(-1, (-1, config.head_dim)), rotation) for t in (q, k))
        elif config.temperature_tuning:
            q = q * temperature(positions, config)
        chunk = config.chunk if self.layer.chunked else 0
        out, key, value = cached_attention(
            q, k, v, *past, positions, past_positions, config.heads, config.kv_heads, chunk
        )
        return self.o_proj(out), (key, value)

    def rotate_and_norm(self, x: Tensor, rotation: KeyValue) -> Tensor:
        """[B, S, heads, D] -> [B, S, heads*D]: rotary embedding, then weightless RMS norm if the model has it."""
        x = rotate_pairs(x, *rotation)
        if self.config.qk_norm:
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return x.flatten(2)


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward with residuals."""

    def __init__(self, config: TextConfig, layer: Layer) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = MoE(config) if layer.moe else MLP(config.hidden_size, config.dense_ffn)

    def forward(
        self, x: Tensor, rotation: KeyValue, past: KeyValue, positions: Tensor, past_positions: Tensor
    ) -> tuple[Tensor, KeyValue, Tensor | None]:
        """`x` [B, S, H] -> next hidden [B, S, H], present key and value, expert ids [T, k] of a MoE layer."""
        x, present = self.attend(x, rotation, past, positions, past_positions)
        y = self.post_attention_layernorm(x)
        if not isinstance(self.feed_forward, MoE):
            return x + self.feed_forward(y), present, None
        routed, expert_id = self.feed_forward(y.flatten(0, 1))
        return x + routed.view_as(x), present, expert_id

    def attend(
        self, x: Tensor, rotation: KeyValue, past: KeyValue, positions: Tensor, past_positions: Tensor
    ) -> tuple[Tensor, KeyValue]:
        """The layer's first half: `x` [B, S, H] -> hidden [B, S, H] before the feed-forward, present key and value."""
        attended, present = self.self_attn(self.input_layernorm(x), rotation, past, positions, past_positions)
        return x + attended, present


class Decoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config, layer) for layer in config.layers])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class TextModel(nn.Module):
    """The decoder with its language-model head, stepped over an explicit cache."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tied_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)

    def forward(
        self,
        inputs_embeds: Tensor,
        positions: Tensor,
        chunk_past_positions: Tensor,
        global_past_positions: Tensor,
        logits_index: Tensor,
        past: Sequence[KeyValue],
    ) -> StepTensors:
        """One step of S tokens for B rows.

        `inputs_embeds` [B, S, H], `positions` [B, S] int64, `chunk_past_positions` [B, Pc] and `global_past_positions`
        [B, Pg] int64 (-1 = empty slot) for the chunked and the global layers' caches, `logits_index` [L] int64 (the
        slots that get logits), `past` per layer key and value [B, K, P, D].
        """
        config = self.config
        rotation = rotation_table(positions, config)
        x, present, hiddens, expert_ids = inputs_embeds, [], [], []
        for layer, spec, cache in zip(self.model.layers, config.layers, past, strict=True):
            past_positions = chunk_past_positions if spec.chunked else global_past_positions
            x, key_value, expert_id = layer(x, rotation, cache, positions, past_positions)
            present.append(key_value)
            hiddens.append(x)
            if expert_id is not None:
                expert_ids.append(expert_id)
        logits = self.head(self.model.norm(x.index_select(1, logits_index)))
        return StepTensors(logits, present, hiddens, expert_ids)

    def head(self, last: Tensor) -> Tensor:
        """The logits [..., V] of normalised hidden states [..., H]."""
        if self.config.tied_embeddings:
            return F.linear(last, self.model.embed_tokens.weight.to(last.dtype))
        logits: Tensor = self.lm_head(last)
        return logits

    def empty_cache(self, batch: int) -> list[KeyValue]:
        """A cache with no slots: per layer key and value [B, K, 0, D] float32."""
        shape = (batch, self.config.kv_heads, 0, self.config.head_dim)
        return [(torch.zeros(shape), torch.zeros(shape)) for _ in self.config.layers]


class Llama4(nn.Module):
    """The whole model under the checkpoint's own parameter names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.language_model = TextModel(config.text)
        if config.vision is not None:
            self.vision_model = VisionModel(config.vision)
            self.multi_modal_projector = Projector(config.vision.adapter_out, config.text.hidden_size)

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Tiles [n, 3, h, w] -> image token embeddings [n * tokens per tile, H]."""
        return self.multi_modal_projector(self.vision_model(pixel_values)).flatten(0, 1)

    def embed(self, input_ids: Tensor, image_features: Tensor) -> Tensor:
        """Token embeddings [B, S, H] with `image_features` [M, H] put, in order, where ids are the image token.

        M may exceed the number of placeholders; the surplus is ignored.
        """
        embeds = self.language_model.model.embed_tokens(input_ids)
        if self.config.image_token_id is None:
            return embeds
        placeholders = input_ids == self.config.image_token_id  # [B, S]
        order = placeholders.flatten().long().cumsum(0).view_as(input_ids)  # 1-based rank of each placeholder
        padded = torch.cat([embeds.new_zeros(1, embeds.shape[-1]), image_features.to(embeds.dtype)])
        return torch.where(placeholders[..., None], padded[torch.where(placeholders, order, 0)], embeds)


def temperature(positions: Tensor, config: TextConfig) -> Tensor:
    """Query scale [B, S, 1] of NoPE layers: log1p(floor((pos+1)/floor_scale)) * attn_scale + 1."""
    # Divided as integers: float32 does not hold every position above 2^24.
    steps = (positions + 1) // config.floor_scale
    return (torch.log1p(steps.float()) * config.attn_scale + 1.0)[..., None]
