"""Lowers canonical graphs for TensorRT for RTX: standard operators only, as this product takes no plugins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.config import ModelConfig
from arriero.graphs.lower.part import WeightTable
from arriero.graphs.lower.tensorrt import SCHEMES, lacks, lacks_on, lower_standard
from arriero.graphs.passes.tile_experts import tile_experts
from arriero.graphs.weights import Progress
from arriero.profiles.kv_cache import CacheScales
from arriero.profiles.roundings import Roundings
from arriero.profiles.schemes import Scheme

__all__ = ["SCHEMES", "lacks", "lacks_on", "lower"]


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
    """Lower one part as `lower_standard` does, its experts as tiles of gathered matrices, whatever the GPU."""
    assert cache is None
    return lower_standard(part, canonical, config, checkpoint, assignment, out_dir, progress, roundings, tile_experts)
