"""The phrase that says what a model's layers are: how many of which kind, and what goes with experts and chunks."""

from __future__ import annotations

from collections.abc import Mapping


def describe_layers(layers: Mapping[str, int], experts: int, per_token: int, chunk: int) -> str:
    """`3 chunked moe, 1 global moe; 16 experts, 1 per token; chunk 8,192`, `layers` counted by kind."""
    phrases = [", ".join(f"{count} {kind}" for kind, count in layers.items())]
    if any(kind.endswith("moe") for kind in layers):
        phrases.append(f"{experts} experts, {per_token} per token")
    if any(kind.startswith("chunked") for kind in layers):
        phrases.append(f"chunk {chunk:,}")
    return "; ".join(phrases)
