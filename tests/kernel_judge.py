"""What the kernels must give, in float64 numpy, from the definitions and from nothing of theirs."""

from __future__ import annotations

import numpy as np

from arriero.profiles.grids import NORMAL_LEVELS
from arriero.profiles.quantize import Quantized


def integers(weight: Quantized) -> np.ndarray:
    """The integers [..., N, K] that the codes stand for, as int64."""
    ones = np.unpackbits(weight.packed, axis=-1, bitorder="little")
    codes = ones.reshape(*ones.shape[:-1], -1, weight.bits) @ (1 << np.arange(weight.bits))
    if weight.grid == "normal":
        return np.array(NORMAL_LEVELS[weight.bits])[codes]
    return codes - 2 ** (weight.bits - 1)


def round_activations(x: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 values [T, J, block] and float32 scales [T, J], in float32 arithmetic as the header defines it."""
    blocks = x.astype(np.float32).reshape(len(x), x.shape[1] // block, block)
    absmax = np.abs(blocks).max(-1)
    empty = absmax < np.float32(1e-30)
    inverse = np.where(empty, np.float32(0), np.float32(127) / np.where(empty, np.float32(1), absmax))
    values = np.rint(blocks * inverse[..., None]).astype(np.int64)
    return values, np.where(empty, np.float32(0), absmax / np.float32(127))


def rounded_linear(x: np.ndarray, weight: Quantized) -> tuple[np.ndarray, np.ndarray]:
    """y [T, N] of activations rounded to int8 and the sum of its terms' magnitudes, which bounds float32's error."""
    values, scales = round_activations(x, weight.block)
    rows = integers(weight).reshape(*weight.scales.shape, weight.block)  # [N, J, block]
    products = np.einsum("tjb,njb->tnj", values, rows)
    terms = products * scales[:, None, :].astype(np.float64) * weight.scales[None]
    return terms.sum(-1), np.abs(terms).sum(-1)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def dispatch(x, expert_id, score, gate_up, down) -> np.ndarray:
    """Expert dispatch with float64 weights gate_up [E, H, 2F] and down [E, F, H]."""
    y = np.zeros(x.shape)
    for t, ids in enumerate(expert_id):
        for e, s in zip(ids, score[t], strict=True):
            if 0 <= e < len(gate_up):
                gate, up = np.split((x[t].astype(np.float64) * s) @ gate_up[e], 2)
                y[t] += (silu(gate) * up) @ down[e]
    return y


def attention(q, k, v, start, past_key, past_value) -> np.ndarray:
    """Attention of rows whose first new slot is start[b]; q [B, S, Q, D], k, v [B, S, G, D], past [B, G, C, D]."""
    batch, steps, heads, size = q.shape
    groups = k.shape[2]
    out = np.zeros(q.shape)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // groups)
            keys = np.concatenate([past_key[b, g, : start[b]], k[b, :, g]]).astype(np.float64)
            values = np.concatenate([past_value[b, g, : start[b]], v[b, :, g]]).astype(np.float64)
            for s in range(steps):
                seen = start[b] + s + 1
                scores = keys[:seen] @ q[b, s, h] / np.sqrt(size)
                weights = np.exp(scores - scores.max())
                out[b, s, h] = weights @ values[:seen] / weights.sum()
    return out
