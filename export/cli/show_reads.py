"""What a session under a cap on its memory read of its experts, in a line."""

from __future__ import annotations

from arriero.runtimes.backend import CacheStatistics
from arriero.sizes import human_bytes


def describe_reads(statistics: CacheStatistics) -> str:
    """How many experts were found in memory, what was read and how fast, and how long steps waited for it."""
    layers = statistics.layers
    hits, misses = sum(one.hits for one in layers), sum(one.misses for one in layers)
    nbytes, seconds = sum(one.bytes for one in layers), sum(one.seconds for one in layers)
    held = sum(one.slots for one in layers) / sum(one.experts for one in layers)
    rate = f" at {human_bytes(nbytes / seconds)}/s" if seconds else ""
    text = (
        f"experts: {held:.0%} fit in memory, {hits / max(1, hits + misses):.0%} of those needed were there, "
        f"{human_bytes(nbytes)} read{rate}, {sum(one.waited for one in layers):.1f} s waited"
    )
    return text if statistics.buffered is None else f"{text}; {statistics.buffered}"
