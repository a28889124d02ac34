"""What each optimisation profile of an engine is dimensioned for, and the signature that the runtime binds by.

Legend: B batch rows, S new tokens per row, L slots that get logits, C cache capacity, n tiles, M image features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from arriero.runtimes.backend import TILES_AT_ONCE
from arriero.traits import PREFILL_PIECE

Range = tuple[int, int, int]  # least, usual, most


@dataclass(frozen=True)
class Limits:
    """What the target asks of its engines: tokens per sequence, sequences together, and the model's attention chunk."""

    context: int
    batch: int
    chunk: int

    @property
    def capacities(self) -> dict[str, int]:
        """The slots of the cache's buffers, which an engine wants to know: all of a chunk, all of the context."""
        return {"chunk_capacity": min(self.chunk, self.context), "global_capacity": self.context}

    @property
    def piece(self) -> int:
        """The most tokens of one step: a prompt piece never crosses a chunk."""
        return min(PREFILL_PIECE, self.chunk, self.context)

    def profiles(self, part: str) -> dict[str, dict[str, Range]]:
        """Name of a profile -> name of a dynamic size -> its range."""
        one, rows, tokens = (1, 1, 1), (1, self.batch, self.batch), (1, self.piece, self.piece)
        if part == "text":
            return {
                "decode": {"batch": rows, "seq": one, "logits": one},
                "prefill": {"batch": one, "seq": tokens, "logits": (1, 1, self.piece)},
            }
        if part == "embed":
            return {"any": {"batch": rows, "seq": (1, 1, self.piece), "features": (0, 0, self.piece)}}
        return {"tiles": {"tiles": (1, TILES_AT_ONCE, TILES_AT_ONCE)}}


def settle_capacities(model: ir.Model, limits: Limits) -> None:
    """Give the cache's buffers, in and out, their capacity: no engine takes one that changes."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        sizes = limits.capacities
        value.shape = ir.Shape([sizes.get(size, size) if isinstance(size, str) else size for size in shape(value)])


def signature(model: ir.Model, limits: Limits, part: str) -> dict[str, Any]:
    """Inputs, outputs and profiles as `<part>.json` holds them: dtypes in ONNX's words, dynamic sizes by name."""

    def describe(value: ir.Value) -> dict[str, Any]:
        assert value.dtype is not None
        return {"name": str(value.name), "dtype": value.dtype.name, "shape": shape(value)}

    profiles = [
        {"name": name, "ranges": {str(value.name): ranges(value, sizes) for value in model.graph.inputs}}
        for name, sizes in limits.profiles(part).items()
    ]
    inputs, outputs = ([describe(value) for value in values] for values in (model.graph.inputs, model.graph.outputs))
    return {"inputs": inputs, "outputs": outputs, "profiles": profiles}


def ranges(value: ir.Value, sizes: Mapping[str, Range]) -> list[list[int]]:
    """The least, usual and largest shape of an input."""
    return [[size if isinstance(size, int) else sizes[size][at] for size in shape(value)] for at in range(3)]


def shape(value: ir.Value) -> list[int | str]:
    """The shape of an input or output, with names for dynamic sizes."""
    assert value.shape is not None
    return [size if isinstance(size, int) else str(size.value) for size in value.shape]
