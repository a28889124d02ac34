"""The content hash of a checkpoint, with a word of how far it is: it may read hundreds of gibibytes."""

from __future__ import annotations

from pathlib import Path

from arriero.export.compile import Watch
from arriero.graphs.checkpoint import Checkpoint


def hash_checkpoint(checkpoint: Checkpoint, watch: Watch, memo: Path | None = None, adapter: str | None = None) -> str:
    """Give `checkpoint.content_hash(memo)`; with `adapter` the checkpoint has that one merged, and the step says so."""
    step = "hash checkpoint" if adapter is None else f"hash checkpoint with {adapter}"
    return checkpoint.content_hash(memo, lambda done, total: watch(step, done, total, "bytes"))
