"""Lowers canonical graphs for TensorRT for RTX: standard operators only, as this product takes no plugins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.config import ModelConfig
from arriero.graphs.lower.part import WeightTable
from arriero.graphs.lower.tensorrt import SCHEMES, lacks, lower_standard
from arriero.graphs.lower.tensorrt import lacks_on as lacks_on_any
from arriero.graphs.passes.tile_experts import tile_experts
from arriero.graphs.weights import Progress
from arriero.profiles.kv_cache import CacheScales
from arriero.profiles.roundings import Roundings
from arriero.profiles.schemes import IntBlock, Scheme, Static

__all__ = ["SCHEMES", "lacks", "lacks_on", "lower"]
TURING = 75


def lacks_on(scheme: Scheme, capability: int) -> str | None:
    """What of `scheme` this product does not compute on a GPU; None when it does. On Turing it knows float16 alone."""
    if capability == TURING and isinstance(scheme, IntBlock | Static):
        return f"{scheme.told} on sm_{TURING} (there it takes float16 alone)"
    return lacks_on_any(scheme, capability)


def lower(
    part: str,
    canonical: ir.Model,
    config: ModelConfig,
    checkpoint: Checkpoint,
    assignment: Mapping[str, Scheme],
    out_dir: Path,
    progress: Progress | None = None,
    roundings: Roundings | None = None,
    cache: Sequence[CacheScales] | None = None,
    *,
    capability: int = 0,
) -> WeightTable:
    """Lower one part as `lower_standard` does, its experts as tiles of gathered matrices, whatever the GPU.

    On Turing the product refuses float32 matrix products, so that the router's become sums.
    """
    assert cache is None
    given = (part, canonical, config, checkpoint, assignment, out_dir, progress, roundings, tile_experts)
    return lower_standard(*given, sums=capability == TURING)
