"""Experts that a checkpoint stores one by one, as the stacks of a MoE layer: gate|up [E, H, 2F] and down [E, F, H].

Quantising tools split them into matrices [out, in], `experts.3.gate_proj.weight`, or by their halves alone. Legend: E
experts, H hidden, F expert width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arriero.errors import ArrieroError, raise_together
from arriero.graphs.sources.made_weight import MadeWeight
from arriero.graphs.sources.safetensors_header import NUMPY_DTYPES
from arriero.graphs.sources.stored_codes import Codes, StoredCodes
from arriero.graphs.sources.weight_source import WeightSource
from arriero.profiles.float8 import Float8
from arriero.profiles.quantize import Quantized
from arriero.profiles.turn import turned

SPLIT = re.compile(r"(?P<stack>.+\.experts)\.(?P<expert>\d+)\.(?P<matrix>gate_proj|up_proj|down_proj)\.weight")
STACKS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
Parts = list[tuple[WeightSource, ...]]  # of each expert, the matrices [n, K] whose rows follow each other


def fuse_experts(tensors: Mapping[str, WeightSource]) -> dict[str, WeightSource]:
    """`tensors` with every set of single experts put together. Raises `Problems` for sets with holes or odd members."""
    fused: dict[str, WeightSource] = {}
    single: dict[str, dict[int, dict[str, WeightSource]]] = {}
    for name, source in tensors.items():
        match = SPLIT.fullmatch(name)
        if match is None:
            fused[name] = source
        else:
            single.setdefault(match["stack"], {}).setdefault(int(match["expert"]), {})[match["matrix"]] = source
    problems: list[ArrieroError] = []
    for stack, experts in single.items():
        for name, matrices in STACKS.items():
            missing = [
                f"{stack}.{expert}.{matrix}.weight"
                for expert in range(max(experts) + 1)
                for matrix in matrices
                if matrix not in experts.get(expert, {})
            ]
            if missing:
                more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                problems.append(
                    ArrieroError(
                        f"the weight of {missing[0]}{more} is missing",
                        where=stack,
                        expected=f"{' and '.join(matrices)} of every expert up to {max(experts)}",
                        remedy="Is a shard missing, or was the checkpoint cut?",
                    )
                )
                continue
            parts = [tuple(experts[expert][matrix] for matrix in matrices) for expert in range(max(experts) + 1)]
            odd = _odd_one(parts)
            if odd is not None:
                problems.append(odd)
            else:
                fused[f"{stack}.{name}"] = stack_experts(f"{stack}.{name}", parts)
    raise_together(problems, "the checkpoint's experts do not make whole layers")
    return fused


def _odd_one(parts: Parts) -> ArrieroError | None:
    """What keeps matrices from being one stack: one of another shape, or stored another way."""
    first = parts[0][0]
    for source in (source for expert in parts for source in expert):
        for what, own, common in (("has shape", source.shape, first.shape), ("is stored as", source.form, first.form)):
            if own != common:
                shown, expected = (list(one) if isinstance(one, tuple) else one for one in (own, common))
                return ArrieroError(
                    f"{what} {shown}",
                    where=source.stored,
                    expected=f"{expected}, as {first.stored}: the experts of a layer are stored alike",
                    remedy="Quantise all experts of a layer in one way, or take the unquantised checkpoint",
                )
    return None


def stack_experts(name: str, parts: Parts) -> MadeWeight:
    """The stack [E, K, sum of n] of every expert's matrices [n, K], which are turned round and put side by side."""
    first = parts[0][0]
    outputs, features = sum(source.shape[0] for source in parts[0]), first.shape[1]
    dtype = first.dtype

    def make(start: int, stop: int) -> NDArray[Any]:
        stack = np.empty((stop - start, features, outputs), NUMPY_DTYPES[dtype])
        for made, expert in zip(stack, parts[start:stop], strict=True):
            column = 0
            for source in expert:
                turned(source.rows(0, source.shape[0]), made[:, column : column + source.shape[0]])
                column += source.shape[0]
        return stack

    return MadeWeight(
        name, (len(parts), features, outputs), dtype, _shown(parts), first.form, make, _stacked_codes(parts)
    )


def _shown(parts: Parts) -> str:
    others = sum(map(len, parts)) - 1
    return f"{parts[0][0].stored} and {others} others"


def _stacked_codes(parts: Parts) -> StoredCodes | None:
    """The codes of the stack, where every matrix has codes of one form."""
    held = [[source.codes for source in expert] for expert in parts]
    flat = [codes for expert in held for codes in expert]
    if flat[0] is None or any(codes is None or codes.form != flat[0].form for codes in flat):
        return None
    reads = [
        [(codes.read, source.shape[0]) for codes, source in zip(row, expert, strict=True) if codes is not None]
        for row, expert in zip(held, parts, strict=True)
    ]
    return StoredCodes(
        *flat[0].form,
        lambda start, stop: joined_codes([_expert(row) for row in reads[start:stop]], True),
        "F16" if all(codes is not None and codes.scales == "F16" for codes in flat) else "F32",
    )


def _expert(reads: Sequence[tuple[Callable[[int, int], Codes], int]]) -> Codes:
    return joined_codes([read(0, rows) for read, rows in reads], False)


def joined_codes(codes: Sequence[Codes], stacked: bool) -> Codes:
    """Codes one after another along their outputs, or `stacked` along a new axis."""
    join = np.stack if stacked else np.concatenate
    first = codes[0]
    scales = join([one.scales for one in codes])
    if isinstance(first, Float8):
        return Float8(join([one.bits for one in codes if isinstance(one, Float8)]), scales)
    packed = join([one.packed for one in codes if isinstance(one, Quantized)])
    return Quantized(packed, scales, first.bits, first.block)
