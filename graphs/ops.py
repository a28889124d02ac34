"""The custom operators of domain `ai.arriero`: torch declaration, shape rule (fake) and eager computation.

Legend: B batch, S new tokens, P past slots, H hidden, N query heads, K key/value heads, D head size, T tokens (B*S),
k experts per token, E experts, F expert width. The eager forms are differentiable and are what the reference runs;
under `torch.export` the same calls appear as one node each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def expert_dispatch(x: Tensor, expert_id: Tensor, score: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """Routed experts of one MoE layer: y[t] = sum_k down_e(silu(gate_e(s x)) * up_e(s x)), e = expert_id[t,k].

    `x` [T, H], `expert_id` [T, k] int64, `score` [T, k] (sigmoid of the router logit; it scales the expert's INPUT),
    `w_gate_up` [E, H, 2F] with halves gate|up, `w_down` [E, F, H]; weights may be narrower than `x` and are widened
    expert by expert. Returns [T, H]. Source: Llama 4 model code (`Llama4TextMoe`).
    """
    if torch.compiler.is_exporting():
        return torch.ops.arriero.expert_dispatch(x, expert_id, score, w_gate_up, w_down)
    return _expert_dispatch(x, expert_id, score, w_gate_up, w_down)


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    positions: Tensor,
    past_positions: Tensor,
    num_heads: int,
    kv_heads: int,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal grouped-query attention over past and new keys; `chunk` > 0 makes it block-local, 0 global.

    `q` [B, S, N*D], `k`, `v` [B, S, K*D] (already rotated, normalised, tempered), `past_key`, `past_value`
    [B, K, P, D], `positions` [B, S] int64, `past_positions` [B, P] int64 with -1 for an empty slot. A query sees a key
    when 0 <= key position <= its own and, if chunked, both lie in the same chunk. Scale is D**-0.5.
    Returns out [B, S, N*D], present key and value [B, K, P+S, D].
    """
    run = torch.ops.arriero.cached_attention if torch.compiler.is_exporting() else _cached_attention
    return run(q, k, v, past_key, past_value, positions, past_positions, num_heads, kv_heads, chunk)


def _expert_dispatch(x: Tensor, expert_id: Tensor, score: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    per_token = expert_id.shape[1]
    order = expert_id.reshape(-1).argsort(stable=True)  # [T*k], rows grouped by expert
    counts = torch.bincount(expert_id.reshape(-1), minlength=len(w_gate_up)).tolist()
    token = order // per_token
    scaled = x[token] * score.reshape(-1)[order].to(x.dtype)[:, None]  # [T*k, H]
    outputs = []
    for rows, gate_up, down in zip(scaled.split(counts), w_gate_up.unbind(), w_down.unbind(), strict=True):
        if len(rows):
            outputs.append(run_expert(rows, gate_up.to(x.dtype), down.to(x.dtype)))
    if not outputs:
        return torch.zeros_like(x)
    return torch.zeros_like(x).index_add(0, token, torch.cat(outputs).to(x.dtype))


def run_expert(rows: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """What one expert makes of its input [n, H], already scaled: [n, H]. `gate_up` [H, 2F], `down` [F, H]."""
    gate, up = (rows @ gate_up).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ down


def _cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    positions: Tensor,
    past_positions: Tensor,
    num_heads: int,
    kv_heads: int,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    present_key = torch.cat([past_key, k.unflatten(-1, (kv_heads, -1)).transpose(1, 2)], dim=2)
    present_value = torch.cat([past_value, v.unflatten(-1, (kv_heads, -1)).transpose(1, 2)], dim=2)
    key_positions = torch.cat([past_positions, positions], dim=1)[:, None, :]  # [B, 1, P+S]
    query_positions = positions[:, :, None]  # [B, S, 1]
    seen = (key_positions >= 0) & (key_positions <= query_positions)
    if chunk:
        seen &= key_positions // chunk == query_positions // chunk
    out = F.scaled_dot_product_attention(
        q.unflatten(-1, (num_heads, -1)).transpose(1, 2),
        present_key,
        present_value,
        attn_mask=seen[:, None],
        enable_gqa=True,
    )
    return out.transpose(1, 2).flatten(2), present_key, present_value


torch.library.custom_op("arriero::expert_dispatch", mutates_args=())(_expert_dispatch)
torch.library.custom_op("arriero::cached_attention", mutates_args=())(_cached_attention)


@torch.library.register_fake("arriero::expert_dispatch")
def _(x: Tensor, expert_id: Tensor, score: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("arriero::cached_attention")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    positions: Tensor,
    past_positions: Tensor,
    num_heads: int,
    kv_heads: int,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, past, size = past_key.shape
    present = (batch, heads, past + q.shape[1], size)
    return torch.empty_like(q), past_key.new_empty(present), past_value.new_empty(present)
