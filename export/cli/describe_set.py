"""What names a set of samples on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def describe_samples(described: Mapping[str, Any]) -> str:
    """A set as the manifest describes it: its name, seed, samples of each kind, and hash."""
    counts = ", ".join(f"{count} {kind}" for kind, count in described["samples"].items())
    return f"{described['set']}, seed {described['seed']}: {counts} samples; sha256 {described['sha256'][:12]}"
