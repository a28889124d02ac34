"""The expert dispatch in Triton: a second implementation, which shares no line with the CUDA kernels.

Tokens are sorted by expert on the host, and weights are plain numbers, input-major as in a checkpoint, each times its
output's scale. Codes, int8 or E4M3 on both sides, are multiplied as they are; of what is wider the inputs are scaled by
the score first, in float32. Under Triton's interpreter, which `conftest.py` asks for, it runs on a CPU, right for
float32, float16 and codes (its bfloat16 is not).
Legend: T tokens, k experts per token, E experts, H hidden, F expert width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ITEMS = 16  # rows of a tile
OUTPUTS = 32
INPUTS = 32


@triton.jit
def gate_up_kernel(x, score, weights, scales, row_of, expert_of, inner, choices, hidden, ffn, sums: tl.constexpr,
                   codes: tl.constexpr, items: tl.constexpr, outputs: tl.constexpr, inputs: tl.constexpr):  # fmt: skip
    tile, out = tl.program_id(0), tl.program_id(1) * outputs + tl.arange(0, outputs)
    rows = tl.load(row_of + tile * items + tl.arange(0, items))
    expert = tl.load(expert_of + tile)
    there, within = rows >= 0, out < ffn
    factor = tl.load(score + rows, mask=there, other=0.0)[:, None]
    start = weights + expert.to(tl.int64) * hidden * 2 * ffn
    gates = tl.zeros((items, outputs), sums)
    ups = tl.zeros((items, outputs), sums)
    for first in range(0, hidden, inputs):
        k = first + tl.arange(0, inputs)
        a = tl.load(x + (rows // choices)[:, None] * hidden + k[None], there[:, None] & (k < hidden)[None], other=0.0)
        mask = (k < hidden)[:, None] & within[None]
        place = start + k[:, None] * 2 * ffn + out[None]
        b, c = tl.load(place, mask, other=0.0), tl.load(place + ffn, mask, other=0.0)
        if not codes:
            a, b, c = a.to(tl.float32) * factor, b.to(tl.float32), c.to(tl.float32)
        gates += tl.dot(a, b, input_precision="ieee", out_dtype=sums)
        ups += tl.dot(a, c, input_precision="ieee", out_dtype=sums)
    own = scales + expert * 2 * ffn + out
    gate = gates.to(tl.float32) * tl.load(own, within, other=0.0)[None]
    up = ups.to(tl.float32) * tl.load(own + ffn, within, other=0.0)[None]
    if codes:
        gate, up = gate * factor, up * factor
    result = gate / (1.0 + tl.exp(-gate)) * up
    place = inner + rows[:, None] * ffn + out[None]
    tl.store(place, result.to(inner.dtype.element_ty), there[:, None] & within[None])


@triton.jit
def down_kernel(inner, weights, scales, row_of, expert_of, products, hidden, ffn, sums: tl.constexpr,
                codes: tl.constexpr, items: tl.constexpr, outputs: tl.constexpr, inputs: tl.constexpr):  # fmt: skip
    tile, out = tl.program_id(0), tl.program_id(1) * outputs + tl.arange(0, outputs)
    rows = tl.load(row_of + tile * items + tl.arange(0, items))
    expert = tl.load(expert_of + tile)
    there, within = rows >= 0, out < hidden
    start = weights + expert.to(tl.int64) * ffn * hidden
    total = tl.zeros((items, outputs), sums)
    for first in range(0, ffn, inputs):
        k = first + tl.arange(0, inputs)
        a = tl.load(inner + rows[:, None] * ffn + k[None], there[:, None] & (k < ffn)[None], other=0.0)
        mask = (k < ffn)[:, None] & within[None]
        b = tl.load(start + k[:, None] * hidden + out[None], mask, other=0.0)
        if not codes:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total += tl.dot(a, b, input_precision="ieee", out_dtype=sums)
    total = total.to(tl.float32) * tl.load(scales + expert * hidden + out, within, other=0.0)[None]
    tl.store(products + rows[:, None] * hidden + out[None], total, there[:, None] & within[None])


def tiles(expert_id: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of each tile [tiles, ITEMS], -1 where it is not full, and its expert [tiles]."""
    rows, owners = [], []
    for expert in range(experts):
        mine = torch.nonzero(expert_id.reshape(-1) == expert)[:, 0]
        for piece in mine.split(ITEMS) if len(mine) else []:
            rows.append(torch.nn.functional.pad(piece, (0, ITEMS - len(piece)), value=-1))
            owners.append(expert)
    return torch.stack(rows).to(torch.int32), torch.tensor(owners, dtype=torch.int32)


def constants(weights: torch.Tensor) -> tuple[object, ...]:
    """The type of the sums, whether weights are codes, and the sizes of a tile."""
    codes = weights.element_size() == 1
    return (tl.int32 if weights.dtype == torch.int8 else tl.float32), codes, ITEMS, OUTPUTS, INPUTS


def gate_up(
    x: torch.Tensor, expert_id: torch.Tensor, score: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """inner f32 [T*k, F] of `x` [T, H], `weights` [E, H, 2F] and `scales` [E, 2F]. Rows of no expert are zero."""
    experts, hidden, both = weights.shape
    rows, owners = tiles(expert_id, experts)
    inner = torch.zeros(expert_id.numel(), both // 2)
    grid = (len(rows), triton.cdiv(both // 2, OUTPUTS))
    shape = expert_id.shape[1], hidden, both // 2
    gate_up_kernel[grid](x, score, weights, scales, rows, owners, inner, *shape, *constants(weights))
    return inner


def down(inner: torch.Tensor, expert_id: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """y f32 [T, H] of `inner` [T*k, F], `weights` [E, F, H] and `scales` [E, H]."""
    experts, ffn, hidden = weights.shape
    rows, owners = tiles(expert_id, experts)
    products = torch.zeros(len(inner), hidden)
    grid = (len(rows), triton.cdiv(hidden, OUTPUTS))
    down_kernel[grid](inner, weights, scales, rows, owners, products, hidden, ffn, *constants(weights))
    return products.reshape(*expert_id.shape, hidden).sum(1)
