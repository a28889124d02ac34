"""What a parity set can show: for each threshold on a drop of accuracy the cases it needs, against those there are."""

from __future__ import annotations

from collections.abc import Mapping

from arriero.runtimes.proof.paired import CONFIDENCE, POWER, cases_needed, smallest_shown

METRICS = ("task_accuracy_drop", "task_accuracy_forced_drop")
LEAST_DROP = 0.01  # what is looked for beside a threshold below half of it, such as 0


def weak_thresholds(target: str, thresholds: Mapping[str, float], counts: Mapping[str, int]) -> list[str]:
    """One sentence for each threshold of `target` that the scored cases, `counts` by family, are too few for."""
    sentences = []
    for name, limit in thresholds.items():
        metric, _, family = name.partition(".")
        # a drop that is twice the limit has to leave room for the answers gained beside it
        drop = max(2 * limit, LEAST_DROP)
        count = counts.get(family, 0) if family else sum(counts.values())
        if metric not in METRICS or drop > 0.5 or not count or count >= (needed := cases_needed(limit, drop)):
            continue
        smallest = smallest_shown(count, limit)
        shows = "no drop" if smallest is None else f"a drop from {100 * smallest:.1f} points on"
        sentences.append(
            f"target {target}: {name} at most {100 * limit:g} %: {needed:,} scored cases tell a drop of {100 * drop:g} "
            f"points from it ({100 * POWER:.0f} % power, {100 * CONFIDENCE:.0f} % confidence); the parity set has "
            f"{count:,}, which show {shows}"
        )
    return sentences
