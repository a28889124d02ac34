"""What a session did besides answering, in a line: reads of experts under a cap on its memory, drafted tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from arriero.runtimes.backend import CacheStatistics
from arriero.sizes import human_bytes

if TYPE_CHECKING:
    from arriero.runtimes.scheduler import Stats


def describe_drafts(stats: Stats) -> str:
    """How many drafted tokens were right, to follow other counts; nothing where none was drafted."""
    failed = f", {stats.failed_drafts} drafts failed" if stats.failed_drafts else ""
    return f", {stats.accepted_tokens} of {stats.drafted_tokens} drafted{failed}" if stats.drafted_tokens else failed


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
