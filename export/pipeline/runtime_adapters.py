"""What a build's bundles switch between: the checkpoint with each adapter merged, and their factors for the graph."""

from __future__ import annotations

from arriero.export.build_file.schema import BuildConfig
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.sources.runtime_adapters import RuntimeAdapters


def adapted_checkpoints(build: BuildConfig) -> dict[str, Checkpoint]:
    """Name -> the checkpoint with that runtime adapter merged after those that are merged in any case."""
    return {
        name: Checkpoint.open(build.model, (*build.adapters, folder)) for name, folder in build.runtime_adapters.items()
    }


def read_runtime_adapters(build: BuildConfig, checkpoint: Checkpoint) -> RuntimeAdapters:
    """The factors of all runtime adapters. Raises `Problems` for what cannot be switched while a bundle runs."""
    return RuntimeAdapters.read(checkpoint.tensors, build.runtime_adapters)
