"""What a plan foretells of bundles under a cap on memory, for people and for machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from arriero.export.cli.tables import print_rows, print_wrapped
from arriero.export.machine.read_speed import ReadSpeed
from arriero.export.pipeline.foretell_cap import CappedTarget
from arriero.sizes import human_bytes

HEADS = ("target", "core", "experts", "one", "in memory", "found there", "read per token", "tokens/s")


def capped_json(targets: Sequence[CappedTarget], speed: ReadSpeed) -> dict[str, Any]:
    """What the plan's JSON has of them."""
    return {"capped": [asdict(target) for target in targets], "read_speed": asdict(speed)}


def show_capped(targets: Sequence[CappedTarget], speed: ReadSpeed, console: Console) -> None:
    """Print a line for each target that loads, and why the others do not."""
    cap = human_bytes(targets[0].memory)
    title = f"Within {cap}, memory at {human_bytes(speed.memory)}/s and the drive at {human_bytes(speed.drive)}/s"
    rows = [
        (
            target.name,
            human_bytes(target.core),
            human_bytes(target.experts),
            human_bytes(target.record),
            f"{target.slots} of {target.of}",
            f"{target.hit_rate:.0%}",
            human_bytes(target.read_per_token),
            f"{target.tokens_per_second:.2f}",
        )
        for target in targets
        if target.refused is None
    ]
    if rows:
        print_rows(console, HEADS, rows, title)
    for target in targets:
        if target.refused is not None:
            print_wrapped(console, target.refused, 2, f"{target.name}: ")
    if speed.buffered is not None:
        print_wrapped(console, speed.buffered)
