"""What the stage `calibrate` saw: tokens per expert, experts below a profile's minimum, and activation ranges."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from arriero.export.budget import human_bytes
from arriero.export.cases import tell_set
from arriero.export.prove import tell_fallback
from arriero.export.stages import read_record

if TYPE_CHECKING:
    from rich.console import Console

    from arriero.profiles.recipe import Profile

# Columns of the ranges: the matrices of a layer whose input they are; a layer has the first or the second of two.
RANGES = {
    "attention": ("self_attn.q_proj",),
    "attention output": ("self_attn.o_proj",),
    "FFN": ("feed_forward.shared_expert.gate_proj", "feed_forward.gate_proj"),
    "FFN inner": ("feed_forward.shared_expert.down_proj", "feed_forward.down_proj"),
    "expert": ("feed_forward.experts.gate_up_proj",),
    "expert inner": ("feed_forward.experts.down_proj",),
}


def describe_calibration(folder: Path, profiles: Iterable[Profile], planned: int | None) -> dict[str, Any]:
    """The finished stage in `folder` as JSON values; `profiles` are those that calibrate.

    `planned` is what the plan said of its peak memory, in bytes; None when it was done before. Seconds are those of
    the run that finished it.
    """
    record = read_record(folder)
    coverage: dict[str, list[int]] = json.loads((folder / "coverage.json").read_text())
    ranges = json.loads((folder / "ranges.json").read_text())
    names = {name.removesuffix(".weight").partition(".layers.")[2]: seen for name, seen in ranges.items()}
    layers = sorted({int(name.partition(".")[0]) for name in names})
    return {
        "calibration": json.loads((folder / "set.json").read_text()),
        "seconds": record["seconds"],
        "peak_memory_bytes": record["peak_memory_bytes"],
        "planned_memory_bytes": planned,
        "layers": [
            {
                "layer": layer,
                "tokens_per_expert": coverage.get(str(layer)),
                "largest_input": {
                    column: _largest(names[f"{layer}.{name}"])
                    for column, candidates in RANGES.items()
                    for name in candidates
                    if f"{layer}.{name}" in names
                },
            }
            for layer in layers
        ],
        "profiles": [_thin(profile, coverage) for profile in profiles],
    }


def show_calibration(described: dict[str, Any], console: Console) -> None:
    """Print a described calibration for people."""
    console.print(tell_set(described["calibration"]), highlight=False, soft_wrap=True)
    planned = described["planned_memory_bytes"]
    expected = f" (planned: {human_bytes(planned)})" if planned else ""
    console.print(
        f"{described['seconds']:.1f} s in the run that finished it, peak memory "
        f"{human_bytes(described['peak_memory_bytes'])}{expected}",
        highlight=False,
    )
    table = Table("layer", box=SIMPLE_HEAD, pad_edge=False, header_style="bold", padding=0)
    for column in ("tokens per expert\nleast/median/most", *(name.replace(" ", "\n") for name in RANGES)):
        table.add_column(column, justify="right", no_wrap=True)
    for layer in described["layers"]:
        counts, seen = layer["tokens_per_expert"], layer["largest_input"]
        spread = (min(counts), median(counts), max(counts)) if counts else ()
        told = "/".join(f"{count:,.6g}" for count in spread) or "dense"
        table.add_row(str(layer["layer"]), told, *(f"{seen[name]:.3g}" if name in seen else "" for name in RANGES))
    console.print(table)
    console.print("Right of the tokens: the largest magnitude of what goes in.", style="dim")
    for profile in described["profiles"]:
        told = ", ".join(map(tell_fallback, profile["experts"])) or "none"
        console.print(
            f"experts below the {profile['minimum_tokens']} tokens of profile {profile['name']}: {told}",
            style="yellow" if profile["experts"] else None,
            highlight=False,
            soft_wrap=True,
        )


def _largest(seen: Any) -> float:
    """The largest magnitude of one input, or of all experts' inputs."""
    return max(one["largest"] for one in seen) if isinstance(seen, list) else seen["largest"]


def _thin(profile: Profile, coverage: dict[str, list[int]]) -> dict[str, Any]:
    """A profile's rule, and the experts that it applies to."""
    assert profile.calibration is not None
    least = profile.calibration.minimum_tokens
    experts = [
        {"layer": int(layer), "expert": expert, "tokens": count}
        for layer, counts in coverage.items()
        for expert, count in enumerate(counts)
        if count < least
    ]
    return {"name": profile.name, "minimum_tokens": least, "below": profile.calibration.below, "experts": experts}
