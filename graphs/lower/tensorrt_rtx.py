"""Lowers canonical graphs for TensorRT for RTX: standard operators only, as this product takes no plugins."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from arriero.graphs.lower.part import Lowering, WeightTable
from arriero.graphs.lower.tensorrt import activations, lacks, lower_standard, tiles
from arriero.graphs.lower.tensorrt import lacks_on as lacks_on_any
from arriero.profiles.schemes import Exact, IntBlock, Scheme, Static

__all__ = ["activations", "lacks", "lacks_on", "lower", "stored_elements"]
TURING = 75


def lacks_on(scheme: Scheme, capability: int) -> str | None:
    """What of `scheme` this product does not compute on a GPU; None when it does. On Turing it knows float16 alone.

    What a profile keeps exact beside its rules, router and norms, is computed there too.
    """
    if capability == TURING and isinstance(scheme, Exact | IntBlock | Static):
        return f"{scheme.description} on sm_{TURING} (there it takes float16 alone)"
    return lacks_on_any(scheme, capability)


def stored_elements(shape: Sequence[int], scheme: Scheme, narrow: str, capability: int) -> int:
    """The elements of the tensor that a matrix or a stack of experts becomes: as many as it has weights."""
    return math.prod(shape)


def lower(part: str, canonical: ir.Model, lowering: Lowering) -> WeightTable:
    """Lower one part as `lower_standard` does, its experts as tiles of gathered matrices, whatever the GPU.

    On Turing the product refuses float32 matrix products, so that the router's become sums.
    """
    assert lowering.cache.dtype == "float32"
    experts = [tiles(activations(lowering.assignment))]
    return lower_standard(part, canonical, lowering, experts, sums=lowering.capability == TURING)
