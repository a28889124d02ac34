"""How the CUDA kernels are named and launched; `arriero_experts.h` tells what they compute and read.

Legend: T tokens, k experts per token, E experts, H hidden, F expert width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from arriero.errors import ArrieroError
from arriero.graphs.stored.expert_plugins import BLOCKS
from arriero.profiles.float8 import FP8_SINCE

Op = Literal["gate_up", "down"]
Shape = Literal["decode", "prefill"]
OPS: tuple[Op, ...] = ("gate_up", "down")
SHAPES: tuple[Shape, ...] = ("decode", "prefill")
ACTIVATIONS = {"f16": "Half", "bf16": "Bfloat"}  # name -> its C++ type
# The activation types beside each form of the weights. Float16 holds the codes of int8 and fp8 activations exactly.
FORMS = {"exact": ("f16", "bf16"), "int8": ("f16",), "fp8": ("f16",), "int4": ("f16", "bf16")}
BLOCKED = "int4"  # the form with a scale per block
MOST_INT8_FEATURES = 2**31 // 127**2  # of a row whose sums fit 32 bits
DECODE_WARPS = {"exact": 8, "int8": 8, "fp8": 8, "int4": 4}  # of a block
PREFILL_WARPS = 4
MOST_EXPERTS = 512
ITEMS = 64  # of a prefill tile
TILES = 8  # of outputs, of a prefill block
SCALARS = ("tokens", "choices", "experts", "hidden", "ffn", "block")


@dataclass(frozen=True)
class Kernel:
    """One entry point of `experts.cu`."""

    op: Op
    shape: Shape
    activation: str
    form: str

    @property
    def name(self) -> str:
        """The entry point's name."""
        return f"{self.op}_{self.shape}_{self.activation}_{self.form}"

    @property
    def arrays(self) -> tuple[str, ...]:
        """The pointer arguments before the scalars, in order; the result comes after these."""
        if self.op == "gate_up":
            return "x", "expert_id", "score", "gate_up", "scales"
        return "inner", "expert_id", "down", "scales"

    @property
    def entry(self) -> str:
        """The macro of `experts.cu` that defines it."""
        words = f"{self.shape}, {ACTIVATIONS[self.activation]}, {self.activation}, {self.form.upper()}"
        return f"{self.op.upper()}({words})"

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * (DECODE_WARPS[self.form] if self.shape == "decode" else PREFILL_WARPS)

    def runs_on(self, gpu: str) -> bool:
        """Whether `gpu` ("sm_89") has its products, given that it runs any of the kernels."""
        return self.form != "fp8" or int(gpu.removeprefix("sm_")) >= FP8_SINCE

    def grid(self, tokens: Any, choices: int, experts: int, hidden: int, ffn: int) -> tuple[Any, int]:
        """Blocks in x and y; `tokens` may be a number or a symbol that knows +, * and //."""
        width, tile = (ffn, 8) if self.op == "gate_up" else (hidden, 16)
        alone = self.op == "down" and choices > 1  # each token sums its experts in a block of its own
        items = tokens if alone else tokens * choices
        if self.shape == "decode":
            return items, width // tile
        rows = (items + (ITEMS - 1)) // ITEMS if alone else items // ITEMS + (experts + 1)
        return rows, -(-width // (TILES * tile))


KERNELS = tuple(
    Kernel(op, shape, activation, form)
    for op, shape, (form, activations) in product(OPS, SHAPES, FORMS.items())
    for activation in activations
)


def source_of(kernels: Iterable[Kernel]) -> str:
    """C++ that compiles to these entry points alone."""
    return f"#define ARRIERO_KERNELS {' '.join(kernel.entry for kernel in kernels)}\n#include <experts.cu>\n"


def activations_of(form: str, where: str) -> tuple[str, ...]:
    """The activation types that `form` has kernels for. Raises ArrieroError for a form without any, naming the node."""
    if form not in FORMS:
        raise ArrieroError(f"there is no CUDA kernel for weights in {form!r}", where=where, expected=", ".join(FORMS))
    return FORMS[form]


def check_sizes(op: Op, form: str, experts: int, hidden: int, ffn: int, block: int, where: str) -> None:
    """Refuse sizes that the kernels of `op` do not compute, naming the node or tensor `where`."""
    remedy = "Choose a profile that has it, or the portable form of the experts"
    if not 1 <= experts <= MOST_EXPERTS:
        raise ArrieroError(f"{experts} experts", where=where, expected=f"1 to {MOST_EXPERTS}", remedy=remedy)
    for name, size in (("hidden size", hidden), ("expert width", ffn)):
        if size < 16 or size % 16:
            raise ArrieroError(f"the {name} is {size}", where=where, expected="a multiple of 16", remedy=remedy)
    name, size = ("hidden size", hidden) if op == "gate_up" else ("expert width", ffn)
    if form == "int8" and size > MOST_INT8_FEATURES:
        expected = f"at most {MOST_INT8_FEATURES}, whose sums fit 32 bits"
        raise ArrieroError(f"the {name} is {size}", where=where, expected=expected, remedy=remedy)
    if form != BLOCKED:
        if block:
            raise ArrieroError(f"a block of {block}", where=where, expected=f"0: {form} has none", remedy=remedy)
        return
    if block not in BLOCKS:
        expected = f"one of {', '.join(map(str, BLOCKS))}"
        raise ArrieroError(f"blocks of {block} weights per scale", where=where, expected=expected, remedy=remedy)
    if size % block:
        expected = f"a multiple of the block, {block}"
        raise ArrieroError(f"the {name} is {size}", where=where, expected=expected, remedy=remedy)
