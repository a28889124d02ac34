"""Block-wise integers in the byte layout that MatMulNBits and QMoE read, or codes of another grid in their place.

N output features, K input features, J = K / block. An integer q in [-2^(bits-1), 2^(bits-1) - 1] is stored as
q + 2^(bits-1) (offset binary); with fewer than 8 bits codes lie end to end, the first in the lowest bits, so that of 4
bits the even element is the low nibble. `quantize` never uses the lowest one.
Of another grid (see `grids`) the number of the level is stored in its place.
Scales of blocks are numbers that float16 holds, whatever they are kept in: 4 bits in blocks of 32 come to 4.5.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arriero.errors import ArrieroError
from arriero.profiles.grids import Grid, GridName

SLICE_BYTES = 2 << 20  # of a large matrix f32 that one thread rounds at a time


@dataclass(frozen=True)
class Quantized:
    """`packed` u8 [..., N, K*bits/8], `scales` f32 [..., N, J].

    Every scale is finite, and not zero but where a block of the normal grid, which has no level 0, stands for zeros.
    """

    packed: NDArray[np.uint8]
    scales: NDArray[np.float32]
    bits: int
    block: int
    grid: GridName = "even"


def quantize(
    weight: NDArray[np.float32],
    *,
    bits: int,
    block: int,
    name: str,
    scale_type: type[np.floating] = np.float16,
    grid: GridName = "even",
) -> Quantized:
    """Round `weight` f32 [..., N, K] to integers times a scale per block, largest magnitude / (2^(bits-1) - 1).

    The scale is rounded to `scale_type`, float16 or float32, before the integers are chosen. An all-zero block (or one
    too small for a normal float32 scale) gets scale 1 and zeros. In the normal grid, whose scales are float16's, a
    scale has the sign that lays the largest magnitude on the lowest level.
    Raises ArrieroError naming the tensor when K is not a multiple of `block`, a value is not finite, or a scale would
    be beyond float16.
    """
    largest = check_weight(weight, bits=bits, block=block, name=name)
    if grid == "normal":
        return _quantize_to_levels(weight, largest, Grid(bits, grid), block, name)
    top = 2 ** (bits - 1) - 1
    if scale_type is np.float16:
        scales = half_scales(largest / np.float32(top), top=top, name=name)
    else:
        # The bound keeps top * scale finite where the division rounded up.
        bound = np.nextafter(np.finfo(np.float32).max / np.float32(top), np.float32(0))
        scales = np.minimum(largest / np.float32(top), bound).astype(np.float32)
    scales[largest < np.finfo(np.float32).tiny * np.float32(top)] = 1.0
    blocks = weight.reshape(*scales.shape, block)
    integers = np.clip(np.rint(blocks / scales[..., None]), -top, top)
    return pack(integers.reshape(weight.shape), scales, bits=bits, block=block)


def _quantize_to_levels(
    weight: NDArray[np.float32], largest: NDArray[np.float32], grid: Grid, block: int, name: str
) -> Quantized:
    blocks = weight.reshape(*largest.shape, block)
    scales = half_scales(largest / np.float32(grid.reach), top=grid.reach, name=name)
    scales[_block_maxima(weight, block) == largest] *= -1  # the lowest level is the farthest one
    steps = np.where(scales == 0, np.float32(1), scales)[..., None].astype(np.float32, copy=False)
    codes = grid.nearest_codes(blocks / steps).reshape(weight.shape)
    return Quantized(join_codes(codes, grid.bits), scales, grid.bits, block, grid.name)


def half_scales(scales: NDArray[np.float32], *, top: int, name: str) -> NDArray[np.float32]:
    """`scales` of integers up to `top`, which are not negative, as the nearest numbers that float16 holds.

    Where that is so much less that `top` would not reach, as among the smallest numbers of float16, it is the next one.
    Raises ArrieroError naming the tensor when one is beyond float16.
    """
    with np.errstate(over="ignore"):
        halves = scales.astype(np.float16)
    # the next number's bits are the next ones
    halves.view(np.uint16)[...] += halves * np.float32(top + 0.5) < scales * np.float32(top)
    rounded = halves.astype(np.float32)
    if not np.isfinite(rounded).all():
        most = float(np.finfo(np.float16).max)
        raise ArrieroError(
            f"{int(np.count_nonzero(~np.isfinite(rounded)))} blocks need a scale of up to {scales.max():g}",
            where=name,
            expected=f"at most {most:g}, what float16 holds: values up to {most * top:g}",
            remedy="Keep the tensor exact in the profile, or look whether the checkpoint is damaged",
        )
    return rounded


def check_weight(weight: NDArray[np.float32], *, bits: int, block: int, name: str) -> NDArray[np.float32]:
    """The largest magnitude of each block [..., N, J]. Raises ArrieroError as `quantize` does."""
    if bits not in (2, 3, 4, 8):
        raise ValueError(f"bits must be 2, 3, 4 or 8, not {bits}")
    check_block(weight.shape[-1], block, name)
    largest = _block_maxima(np.abs(weight), block)
    if not np.isfinite(largest).all():
        raise ArrieroError(
            f"{int(np.count_nonzero(~np.isfinite(weight)))} of {weight.size} values are NaN or infinite",
            where=name,
            remedy="The checkpoint is damaged: fetch it again",
        )
    return largest


def _block_maxima(values: NDArray[np.float32], block: int) -> NDArray[np.float32]:
    """The largest of each block [..., N, J]: as `max` along the blocks finds it, which takes twice as long."""
    starts = np.arange(0, values.size, block)
    largest: NDArray[np.float32] = np.maximum.reduceat(values.reshape(-1), starts)
    return largest.reshape(*values.shape[:-1], values.shape[-1] // block)


def check_block(features: int, block: int, name: str) -> None:
    """Refuse a block size that does not divide the input features of tensor `name`."""
    if features % block:
        raise ArrieroError(
            f"{features} input features do not divide into blocks of {block}",
            where=name,
            remedy="Choose a smaller `block` for it in the profile, or keep it exact",
        )


def pack(
    integers: NDArray[np.float32], scales: NDArray[np.float32], *, bits: int, block: int, grid: GridName = "even"
) -> Quantized:
    """Pack levels [..., N, K] (held as floats) of a grid of `bits` bits, with their scales [..., N, J]."""
    return Quantized(join_codes(Grid(bits, grid).codes(integers), bits), scales, bits, block, grid)


def join_codes(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Lay codes [..., K] of so many bits end to end, [..., K*bits/8]; of 2 and 3 bits K is a multiple of 8."""
    if bits == 4:  # two to a byte, for any even K
        return codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))
    if bits == 8:
        return np.ascontiguousarray(codes)
    words = np.zeros((*codes.shape[:-1], codes.shape[-1] // 8), "<u4")
    for number in range(8):
        words |= codes[..., number::8].astype(np.uint32) << np.uint32(bits * number)
    return words[..., None].view(np.uint8)[..., :bits].reshape(*codes.shape[:-1], -1)


def split_codes(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The codes [..., K] that `join_codes` laid end to end."""
    if bits == 8:
        return packed
    *leading, length = packed.shape
    codes = np.empty((*leading, length * 8 // bits), np.uint8)
    if bits == 4:
        np.bitwise_and(packed, np.uint8(15), out=codes[..., 0::2])
        np.right_shift(packed, np.uint8(4), out=codes[..., 1::2])
        return codes
    words = np.zeros((*leading, length // bits, 4), np.uint8)
    words[..., :bits] = packed.reshape(*leading, -1, bits)
    for number in range(8):
        codes[..., number::8] = words.view("<u4")[..., 0] >> np.uint32(bits * number) & np.uint32(2**bits - 1)
    return codes


def dequantize(quantized: Quantized) -> NDArray[np.float32]:
    """The float32 values [..., N, K] that `quantized` stands for."""
    levels = Grid(quantized.bits, quantized.grid).levels(split_codes(quantized.packed, quantized.bits))
    blocks = levels.reshape(*quantized.scales.shape, quantized.block) * quantized.scales[..., None]
    return blocks.reshape(levels.shape)
