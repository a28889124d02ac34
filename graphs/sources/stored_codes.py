"""The codes and scales that a quantised checkpoint stores, where one of our schemes holds both as they are.

Legend: N output features, K input features, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from arriero.profiles.float8 import Float8
from arriero.profiles.quantize import Quantized
from arriero.profiles.schemes import IntBlock

BLOCKS = (256, 128, 64, 32, 16)  # of our schemes of integers, the largest first
Codes = Quantized | Float8


@dataclass(frozen=True)
class StoredCodes:
    """Symmetric integers of `bits` in blocks of `block` along the inputs, or E4M3 with a scale per output (`block` 0).

    `scales` is the type that holds the scales of integers as they are, F16 or F32.
    `read(start, stop)` gives rows of a matrix [N, K], or experts of a stack [E, N, K]: each [N, K], whichever way
    round the values of the tensor are.
    """

    bits: int
    block: int
    read: Callable[[int, int], Codes]
    scales: str = "F32"

    @property
    def form(self) -> tuple[int, int]:
        """What two tensors must have in common to be stored as one."""
        return self.bits, self.block


def scale_type(codes: StoredCodes | None, scheme: IntBlock) -> str:
    """The narrowest type that holds a tensor's scales as they are: F16, or what the checkpoint's own `codes` need."""
    return codes.scales if scheme.rounding == "stored" and codes is not None else "F16"


def block_of(group: int, features: int) -> int | None:
    """The largest block of ours that divides a group of `group` inputs, of `features` in all; None without one."""
    return next((block for block in BLOCKS if group % block == 0 and features % block == 0), None)
