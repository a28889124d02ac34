"""A picture of how many tokens reached each expert, for models with more experts than a list can name."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from arriero.runtimes.proof.svg import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Plot,
    axis_titles,
    bar,
    canvas,
    finish,
    hover,
    label_every,
    text,
)

# CSS class of a cell by the fewest tokens that it takes, and what the legend says of it.
SHADES = (
    ("h0", 0, "none"),
    ("h1", 1, "1 to 9"),
    ("h2", 10, "10 to 99"),
    ("h3", 100, "100 to 999"),
    ("h4", 1000, "1,000 and more"),
)
CELL = 14.0  # the height of a layer's row, less where there are many
DEEPEST = 460.0  # the whole picture


def coverage_map(coverage: Mapping[int, Sequence[int]], thin: Collection[tuple[int, int]]) -> Plot | None:
    """Tokens per expert: layer -> counts in order of the experts. `thin`: (layer, expert) that were rounded without.

    None where there are no experts.
    """
    if not coverage:
        return None
    high = min(CELL, DEEPEST / len(coverage))
    base = TOP + high * len(coverage)
    svg = canvas("Tokens of each expert", base + BOTTOM)
    experts = max(map(len, coverage.values()))
    wide = (WIDTH - LEFT - RIGHT) / experts
    gap = 1.0 if min(wide, high) > 5 else 0.25
    for row, (layer, counts) in enumerate(coverage.items()):
        y = TOP + high * row
        if row % max(1, -(-len(coverage) // 24)) == 0:
            text(svg, LEFT - 6, y + high / 2 + 4, str(layer), "end")
        for expert, count in enumerate(counts):
            missed = (layer, expert) in thin
            shade = "bad" if missed else next(name for name, least, _ in reversed(SHADES) if count >= least)
            cell = bar(svg, LEFT + wide * expert, y, wide - gap, high - gap, shade)
            hover(cell, f"layer {layer}, expert {expert}: {count:,} tokens" + ", rounded without calibration" * missed)
    for expert in range(experts):
        label_every(svg, LEFT + wide * (expert + 0.5), base + 15, expert, expert, experts)
    axis_titles(svg, "expert", "MoE layer", base)
    legend = [(name, words) for name, _, words in SHADES]
    if thin:
        legend.append(("bad", f"too few: {len(thin):,} of {sum(map(len, coverage.values())):,} rounded without"))
    caption = "Tokens of the calibration samples that the router sent to each expert."
    return Plot("Calibration of the experts", caption, tuple(legend), finish(svg))
