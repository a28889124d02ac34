"""What stages leave on disk beside weights and records: graphs, code, the files beside weights, reports."""

from __future__ import annotations

from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.config import ModelConfig
from arriero.graphs.sources.layout import side_files

# Bytes, from runs on small models as `benchmarks/plan_accuracy.py` makes them.
KERNELS_DISK = 1560 << 10
PART_DISK, LAYER_DISK = 64 << 10, 20 << 10  # of the graph of a part, without weights, and of each layer in it
REPORT_DISK, CASE_DISK = 36 << 10, 1500  # both forms of a report, and what is in them of a case
EXPERT_DISK, COVERED_DISK = 137, 117  # of an expert, and of what calibration saw of it


def parts_of(seen: ModelConfig) -> int:
    """How many graphs a model is traced to, seen as far as its modalities need it: embeddings, text, and the tower."""
    return 2 + (seen.vision is not None)


def graphs_disk(seen: ModelConfig) -> int:
    """Of all graphs of a model, traced or lowered."""
    return parts_of(seen) * PART_DISK + seen.layers * LAYER_DISK


def report_disk(seen: ModelConfig, cases: int, *, calibrated: bool) -> int:
    """Of the report of a proof; one of a calibrated bundle tells of the tokens that each expert was calibrated on."""
    experts = len(seen.text.moe_layers) * seen.text.experts
    return REPORT_DISK + cases * CASE_DISK + experts * (EXPERT_DISK + calibrated * COVERED_DISK)


def side_disk(checkpoint: Checkpoint) -> int:
    """Of what a bundle takes from a checkpoint beside weights: the tokenizer with its like, and licences."""
    beside = [checkpoint.side_folder / name for name in side_files(checkpoint.side_folder)]
    return sum(file.stat().st_size for file in (*beside, *checkpoint.license_files))
