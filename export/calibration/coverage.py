"""What the stage `calibrate` saw: tokens per expert, experts below a profile's minimum, and activation ranges."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arriero.runtimes.manifest import CalibratedPart, Fallback

if TYPE_CHECKING:
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


def describe_calibration(
    folder: Path, part: CalibratedPart, record: Mapping[str, Any], profiles: Iterable[Profile], planned: int | None
) -> dict[str, Any]:
    """The finished stage in `folder`, its `part` and `record`, as JSON values; `profiles` are those that calibrate.

    `planned` is what the plan said of its peak memory, in bytes; None when it was done before. Seconds are those of
    the run that finished it.
    """
    ranges = json.loads((folder / "ranges.json").read_text())
    assert part.calibration is not None
    names = {name.removesuffix(".weight").partition(".layers.")[2]: seen for name, seen in ranges.items()}
    layers = sorted({int(name.partition(".")[0]) for name in names})
    return {
        "calibration": asdict(part.calibration),
        "seconds": record["seconds"],
        "peak_memory_bytes": record["peak_memory_bytes"],
        "planned_memory_bytes": planned,
        "layers": [
            {
                "layer": layer,
                "tokens_per_expert": part.coverage.get(str(layer)),
                "largest_input": {
                    column: _largest(names[f"{layer}.{name}"])
                    for column, candidates in RANGES.items()
                    for name in candidates
                    if f"{layer}.{name}" in names
                },
            }
            for layer in layers
        ],
        "profiles": [_thin(profile, part.coverage) for profile in profiles],
    }


def _largest(seen: Any) -> float:
    """The largest magnitude of one input, or of all experts' inputs."""
    return max(one["largest"] for one in seen) if isinstance(seen, list) else seen["largest"]


def _thin(profile: Profile, coverage: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """A profile's rule, and the experts that it applies to."""
    assert profile.calibration is not None
    least = profile.calibration.minimum_tokens
    experts = [
        asdict(Fallback(int(layer), expert, count, profile.calibration.below))
        for layer, counts in coverage.items()
        for expert, count in enumerate(counts)
        if count < least
    ]
    return {"name": profile.name, "minimum_tokens": least, "below": profile.calibration.below, "experts": experts}
