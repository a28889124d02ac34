"""Rotary position embedding that stays exact at any position: cosines and sines of angles, and the rotation of pairs.

A float32 angle, position times frequency, is off by half a radian at ten million. So the angle is never formed: a
position is written in digits of base 256, each digit has a table of cosines and sines computed in float64, and the
angle-sum formula joins them in float32, which keeps every value within a few 1e-7. A traced graph holds the tables as
constants, so that it computes with integers and float32 alone. Legend: B batch, S new tokens, D head size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from arriero.graphs.config import Rope, TextConfig

BASE = 256


def rotation_table(positions: Tensor, config: TextConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine [B, S, D/2] float32 of the RoPE angles at `positions` [B, S] int64, below `max_positions`."""
    frequency = inverse_frequencies(config.rope, config.head_dim)
    cos, sin = _turn(positions % BASE, 1, frequency)
    unit = BASE
    while unit < config.max_positions:
        next_cos, next_sin = _turn(positions // unit % BASE, unit, frequency)
        cos, sin = cos * next_cos - sin * next_sin, sin * next_cos + cos * next_sin
        unit *= BASE
    return cos, sin


def _turn(digit: Tensor, unit: int, frequency: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine [B, S, D/2] float32 of the angle that a `digit` [B, S] worth `unit` positions adds."""
    angles = torch.arange(0, BASE * unit, unit, dtype=torch.double)[:, None] * frequency  # [BASE, D/2]
    return F.embedding(digit, angles.cos().float()), F.embedding(digit, angles.sin().float())


def inverse_frequencies(rope: Rope, size: int) -> Tensor:
    """RoPE frequencies [D/2] float64 for head size `size` (RoFormer; Llama 3.1's frequency rescaling)."""
    frequency = 1.0 / rope.theta ** (torch.arange(0, size, 2, dtype=torch.double) / size)
    if rope.type == "default":
        return frequency
    wavelength = 2 * math.pi / frequency
    low, high = rope.original_context / rope.low_freq_factor, rope.original_context / rope.high_freq_factor
    scaled = torch.where(wavelength > low, frequency / rope.factor, frequency)
    if high >= low:
        return scaled
    smooth = (rope.original_context / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    middle = (wavelength >= high) & (wavelength <= low)
    return torch.where(middle, (1 - smooth) * scaled / rope.factor + smooth * scaled, scaled)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs (2i, 2i+1) of `x` [B, S, heads, D] by angles given as cos, sin [B, S, D/2]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
