"""The plots of the parity page and of comparisons."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Mapping

from arriero.runtimes.proof.metrics import accuracy_interval
from arriero.runtimes.proof.svg import (
    BOTTOM,
    DEEP,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Plot,
    axis_titles,
    bar,
    canvas,
    decades,
    dot,
    finish,
    grid,
    hover,
    label_every,
    limit_line,
    line,
    round_ticks,
    text,
)

LEAST_KL = 1e-6  # nats; a smaller one, which no one can tell from none, is drawn here
BASE = TOP + DEEP  # where a plot's lower axis lies


def error_bars(errors: Mapping[int, float], kinds: Mapping[int, str], limit: float | None) -> Plot | None:
    """Relative error per layer on a logarithmic axis; `kinds` says what each layer is ("chunked, moe"); None if empty.

    A layer without any error has no bar, one whose error is no number has a bar of full height in the failure colour.
    """
    if not errors:
        return None
    shown = [value for value in (*errors.values(), limit or 0.0) if 0.0 < value < math.inf]
    low, high = decades(min(shown), max(shown)) if shown else (-7, -6)
    if shown and math.log10(min(shown)) - low < 0.1:
        low -= 1  # a bar that ends just above the axis would be taken for none

    def height(value: float) -> float:
        return TOP + DEEP * (high - math.log10(value)) / (high - low)

    svg = canvas("Relative error after each layer", BASE + BOTTOM)
    _grid_decades(svg, low, high)
    slot = (WIDTH - LEFT - RIGHT) / len(errors)
    for number, (layer, value) in enumerate(errors.items()):
        x = LEFT + slot * number
        kind = kinds.get(layer, "")
        if value > 0.0 or math.isnan(value):
            broken = not math.isfinite(value)
            y = TOP if broken else height(value)
            style = "bad" if broken else ("b" if kind.startswith("global") else "a")
            hover(bar(svg, x + 0.15 * slot, y, 0.7 * slot, BASE - y, style), f"layer {layer} ({kind}): {value:.3g}")
        else:
            text(svg, x + slot / 2, BASE - 5, "0", "middle")
        label_every(svg, x + slot / 2, BASE + 15, layer, number, len(errors))
    if limit:
        limit_line(svg, height(limit))
    axis_titles(svg, "layer", "relative L2 error")
    legend = [
        *((("a", "chunked attention"),) if any(kind.startswith("chunked") for kind in kinds.values()) else ()),
        *((("b", "global attention"),) if any(kind.startswith("global") for kind in kinds.values()) else ()),
        *((("bad", "not a number"),) if not all(map(math.isfinite, errors.values())) else ()),
        *((("limit", f"threshold, {limit:g}"),) if limit else ()),
    ]
    return Plot(
        "Error after each layer",
        "Relative L2 error of the residual stream, logarithmic. It grows with depth; a jump marks the layer at fault.",
        tuple(legend),
        finish(svg),
    )


def agreement_bars(shares: Mapping[int, float], notes: Mapping[int, str], limit: float | None) -> Plot | None:
    """Share of tokens per MoE layer that go to the reference's experts, hanging from 100 %; None if there is none.

    The axis begins just below the lowest share. Lines hang from the top, so their length is the disagreement.
    """
    if not shares:
        return None
    seen = [value for value in (*shares.values(), 1.0 if limit is None else limit) if math.isfinite(value)]
    lowest = min(seen, default=1.0)
    ticks = round_ticks(min(lowest - 0.1 * (1.0 - lowest), 0.99), 1.0)
    low = max(ticks[0], 0.0)

    def height(value: float) -> float:
        return TOP + 8 + (DEEP - 8) * (1.0 - value) / (1.0 - low)

    svg = canvas("Router agreement of each MoE layer", BASE + BOTTOM)
    for value in ticks:
        if value >= low:
            grid(svg, height(value), f"{100 * value:.6g} %")
    slot = (WIDTH - LEFT - RIGHT) / len(shares)
    for number, (layer, value) in enumerate(shares.items()):
        x = LEFT + slot * (number + 0.5)
        broken = not math.isfinite(value)
        y = height(low if broken else value)
        style = "bad" if broken or (limit is not None and value < limit) else "a"
        line(svg, x, height(1.0), x, y, f"stem {style}")
        mark = dot(svg, x, y, min(5, 0.4 * slot), style)
        hover(mark, f"layer {layer}: {100 * value:.2f} % ({notes.get(layer, '')})")
        label_every(svg, x, BASE + 15, layer, number, len(shares))
    if limit is not None:
        limit_line(svg, height(limit))
    axis_titles(svg, "MoE layer", "tokens with the same experts")
    below = (("bad", "layer below the threshold"), ("limit", f"threshold, {100 * limit:.6g} %")) if limit else ()
    unknown = [str(layer) for layer, value in shares.items() if not math.isfinite(value)]
    caption = (
        f"Tokens sent to the same experts as in the reference, near ties left out; the axis ends at {100 * low:.6g} %."
    )
    if unknown:
        caption += f" Not a number, drawn at the axis' end: layer {', '.join(unknown)}."
    return Plot("Router agreement", caption, (("a", "layer"), *below) if below else (), finish(svg))


def family_bars(scores: Mapping[str, tuple[int, int, int]]) -> Plot | None:
    """Accuracy with its interval of each task family: name -> (reference right, candidate right, cases)."""
    if not scores:
        return None
    row, left, right = 46, 136, 62
    svg = canvas("Task accuracy of each family", TOP + row * len(scores) + BOTTOM)
    span, base = WIDTH - left - right, TOP + row * len(scores)
    for part in range(5):
        x = left + span * part / 4
        line(svg, x, TOP, x, base, "grid")
        text(svg, x, base + 15, f"{25 * part} %", "middle")
    for number, (family, (*rights, count)) in enumerate(scores.items()):
        top = TOP + row * number
        text(svg, left - 8, top + row / 2 + 4, family if len(family) < 17 else f"{family[:15]}…", "end", "strong")
        for lane, (hits, style) in enumerate(zip(rights, ("ref", "a"), strict=True)):
            share, y = hits / count, top + 6 + 18 * lane
            interval = accuracy_interval(hits, count)
            mark = bar(svg, left, y, span * share, 15, style)
            side = ("reference", "candidate")[lane]
            hover(mark, f"{family}, {side}: {hits} of {count}, {100 * interval[0]:.1f} to {100 * interval[1]:.1f} %")
            begin, end = (left + span * edge for edge in interval)
            line(svg, begin, y + 7.5, end, y + 7.5, "error")
            for x in (begin, end):
                line(svg, x, y + 4, x, y + 11, "error")
            text(svg, WIDTH - 2, y + 12, f"{100 * share:.1f} %", "end")
    axis_titles(svg, "answers right", "task family", base, left)
    cut = " Longer names are cut; a pointer over the bar shows them." if any(len(name) > 16 for name in scores) else ""
    return Plot(
        "Task accuracy",
        f"Answers scored right, with Wilson's interval at 95 % confidence: what other such cases may give.{cut}",
        (("ref", "reference"), ("a", "candidate")),
        finish(svg),
    )


def size_and_error(points: Mapping[str, tuple[float, float]]) -> Plot | None:
    """Quality against size: name -> (MiB, mean KL in nats), KL on a logarithmic axis; None without points."""
    if not points:
        return None
    errors = {name: max(kl, LEAST_KL) for name, (_, kl) in points.items()}
    low, high = decades(min(errors.values()), max(errors.values()))
    ticks = round_ticks(0.0, 1.05 * max(size for size, _ in points.values()))
    widest = ticks[-1]
    svg = canvas("Quality against size", BASE + BOTTOM)
    _grid_decades(svg, low, high)
    for tick in ticks:
        text(svg, LEFT + (WIDTH - LEFT - RIGHT) * tick / widest, BASE + 15, f"{tick:,.6g}", "middle")
    labels: list[tuple[float, float]] = []
    for name, (size, kl) in points.items():
        x = LEFT + (WIDTH - LEFT - RIGHT) * size / widest
        y = TOP + DEEP * (high - math.log10(errors[name])) / (high - low)
        hover(dot(svg, x, y, 5, "a"), f"{name}: {size:.3g} MiB, mean KL {kl:.3g} nat")
        right = x > WIDTH / 2
        beside = y + 4
        while any(abs(x - other) < 120 and abs(beside - height) < 13 for other, height in labels):
            beside += 13
        labels.append((x, beside))
        text(svg, x - 9 if right else x + 9, beside, name, "end" if right else "start", "strong")
    axis_titles(svg, "size of the bundle, MiB", "mean KL, nat")
    caption = "Mean KL of the logits, logarithmic, over the bundle's bytes: the lower and the further left, the better."
    clipped = [name for name, (_, kl) in points.items() if kl < LEAST_KL]
    if clipped:
        caption += f" Below {LEAST_KL:g} and drawn there: {', '.join(clipped)}."
    return Plot("Quality against size", caption, (), finish(svg))


def _grid_decades(svg: ET.Element, low: int, high: int) -> None:
    for decade in range(low, high + 1, max(1, (high - low) // 6)):
        grid(svg, TOP + DEEP * (high - decade) / (high - low), f"1e{decade}")
