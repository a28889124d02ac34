"""The parity page's plots as inline SVG: no scripts, no fonts or files from elsewhere, colours from the page's CSS."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass

from arriero.runtimes.proof.metrics import accuracy_error

WIDTH, LEFT, RIGHT = 520, 52, 12  # in SVG units; the page scales the whole
TOP, DEEP, BOTTOM = 12, 190, 34  # space above the plot, its height, space below


@dataclass(frozen=True)
class Plot:
    """A titled SVG. `legend` pairs a CSS class of the marks with what they stand for."""

    title: str
    caption: str
    legend: tuple[tuple[str, str], ...]
    svg: str


def error_bars(errors: Mapping[int, float], kinds: Mapping[int, str], limit: float | None) -> Plot | None:
    """Relative error per layer on a logarithmic axis; `kinds` says what each layer is ("chunked, moe"); None if empty.

    A layer without any error has no bar, one whose error is no number has a bar of full height in the failure colour.
    """
    if not errors:
        return None
    shown = [value for value in (*errors.values(), limit or 0.0) if 0.0 < value < math.inf]
    low = math.floor(math.log10(min(shown))) if shown else -7
    if shown and math.log10(min(shown)) - low < 0.1:
        low -= 1  # a bar that ends just above the axis would be taken for none
    high = max(math.ceil(math.log10(max(shown))) if shown else low + 1, low + 1)

    def height(value: float) -> float:
        return TOP + DEEP * (high - math.log10(value)) / (high - low)

    svg = _canvas("Relative error after each layer", TOP + DEEP + BOTTOM)
    step = max(1, (high - low) // 6)
    for decade in range(low, high + 1, step):
        _grid(svg, height(10.0**decade), f"1e{decade}")
    slot = (WIDTH - LEFT - RIGHT) / len(errors)
    for number, (layer, value) in enumerate(errors.items()):
        x = LEFT + slot * number
        kind = kinds.get(layer, "")
        if value > 0.0 or math.isnan(value):
            broken = not math.isfinite(value)
            y = TOP if broken else height(value)
            style = "bad" if broken else ("b" if kind.startswith("global") else "a")
            bar = _bar(svg, x + 0.15 * slot, y, 0.7 * slot, TOP + DEEP - y, style)
            _hover(bar, f"layer {layer} ({kind}): {value:.3g}")
        else:
            _text(svg, x + slot / 2, TOP + DEEP - 5, "0", "middle")
        _layer_label(svg, x + slot / 2, layer, number, len(errors))
    if limit:
        _limit_line(svg, height(limit))
    _axis_title(svg, "layer")
    legend = [
        *((("a", "chunked attention"),) if any(kind.startswith("chunked") for kind in kinds.values()) else ()),
        *((("b", "global attention"),) if any(kind.startswith("global") for kind in kinds.values()) else ()),
        *((("bad", "not a number"),) if not all(map(math.isfinite, errors.values())) else ()),
        *((("limit", "threshold"),) if limit else ()),
    ]
    return Plot(
        "Error after each layer",
        "Relative L2 error of the residual stream, logarithmic. It grows with depth; a jump marks the layer at fault.",
        tuple(legend),
        _done(svg),
    )


def agreement_bars(shares: Mapping[int, float], notes: Mapping[int, str], limit: float | None) -> Plot | None:
    """Share of tokens per MoE layer that go to the reference's experts, hanging from 100 %; None if there is none.

    The axis begins just below the lowest share. Lines hang from the top, so their length is the disagreement.
    """
    if not shares:
        return None
    seen = [value for value in (*shares.values(), 1.0 if limit is None else limit) if math.isfinite(value)]
    lowest = min(seen, default=1.0)
    low = next((edge for edge in (0.99, 0.98, 0.95, 0.9, 0.8, 0.5) if lowest - edge > 0.1 * (1 - edge)), 0.0)

    def height(value: float) -> float:
        return TOP + 8 + (DEEP - 8) * (1.0 - value) / (1.0 - low)

    svg = _canvas("Router agreement of each MoE layer", TOP + DEEP + BOTTOM)
    for part in range(5):
        value = low + (1.0 - low) * part / 4
        _grid(svg, height(value), f"{100 * value:.4g} %")
    slot = (WIDTH - LEFT - RIGHT) / len(shares)
    for number, (layer, value) in enumerate(shares.items()):
        x = LEFT + slot * (number + 0.5)
        broken = not math.isfinite(value)
        y = height(low if broken else value)
        style = "bad" if broken or (limit is not None and value < limit) else "a"
        _line(svg, x, height(1.0), x, y, f"stem {style}")
        dot = ET.SubElement(svg, "circle", {"cx": _n(x), "cy": _n(y), "r": _n(min(5, 0.4 * slot)), "class": style})
        _hover(dot, f"layer {layer}: {100 * value:.2f} % ({notes.get(layer, '')})")
        _layer_label(svg, x, layer, number, len(shares))
    if limit is not None:
        _limit_line(svg, height(limit))
    _axis_title(svg, "MoE layer")
    return Plot(
        "Router agreement",
        "Tokens sent to the same experts as in the reference. Near ties of the reference's router are left out.",
        (("a", "layer"), ("bad", "layer below the threshold"), ("limit", "threshold")) if limit is not None else (),
        _done(svg),
    )


def family_bars(scores: Mapping[str, tuple[int, int, int]]) -> Plot | None:
    """Accuracy with standard error of each task family: name -> (reference right, candidate right, cases)."""
    if not scores:
        return None
    row, left, right = 46, 116, 62
    svg = _canvas("Task accuracy of each family", TOP + row * len(scores) + BOTTOM)
    span = WIDTH - left - right
    for part in range(5):
        x = left + span * part / 4
        _line(svg, x, TOP, x, TOP + row * len(scores), "grid")
        _text(svg, x, TOP + row * len(scores) + 15, f"{25 * part} %", "middle")
    for number, (family, (*rights, count)) in enumerate(scores.items()):
        top = TOP + row * number
        _text(svg, left - 8, top + row / 2 + 4, family if len(family) < 17 else f"{family[:15]}…", "end", "strong")
        for lane, (hits, style) in enumerate(zip(rights, ("ref", "a"), strict=True)):
            share, error = hits / count, accuracy_error(hits, count)
            y = top + 6 + 18 * lane
            bar = _bar(svg, left, y, span * share, 15, style)
            _hover(bar, f"{family}, {('reference', 'candidate')[lane]}: {hits} of {count}")
            if error:
                begin, end = (left + span * min(max(edge, 0.0), 1.0) for edge in (share - error, share + error))
                _line(svg, begin, y + 7.5, end, y + 7.5, "error")
                for x in (begin, end):
                    _line(svg, x, y + 4, x, y + 11, "error")
            _text(svg, WIDTH - 2, y + 12, f"{100 * share:.1f} %", "end")
    return Plot(
        "Task accuracy",
        "Greedy answers scored right, with one binomial standard error of the sample.",
        (("ref", "reference"), ("a", "candidate")),
        _done(svg),
    )


def size_and_error(points: Mapping[str, tuple[float, float]]) -> Plot | None:
    """Quality against size: name -> (MiB, mean KL in nats), KL on a logarithmic axis; None without points.

    A KL below 1e-6, which no one can tell from none, is drawn on the lowest line.
    """
    if not points:
        return None
    floor = 1e-6
    errors = {name: max(kl, floor) for name, (_, kl) in points.items()}
    low = math.floor(math.log10(min(errors.values())))
    high = max(math.ceil(math.log10(max(errors.values()))), low + 1)
    widest = 1.12 * max(size for size, _ in points.values())
    svg = _canvas("Quality against size", TOP + DEEP + BOTTOM)
    for decade in range(low, high + 1, max(1, (high - low) // 6)):
        _grid(svg, TOP + DEEP * (high - decade) / (high - low), f"1e{decade}")
    for part in range(5):
        x = LEFT + (WIDTH - LEFT - RIGHT) * part / 4
        _text(svg, x, TOP + DEEP + 15, f"{widest * part / 4:.3g}", "middle")
    labels: list[tuple[float, float]] = []
    for name, (size, kl) in points.items():
        x = LEFT + (WIDTH - LEFT - RIGHT) * size / widest
        y = TOP + DEEP * (high - math.log10(errors[name])) / (high - low)
        dot = ET.SubElement(svg, "circle", {"cx": _n(x), "cy": _n(y), "r": "5", "class": "a"})
        _hover(dot, f"{name}: {size:.3g} MiB, mean KL {kl:.3g} nat")
        right = x > WIDTH / 2
        beside = y + 4
        while any(abs(x - other) < 120 and abs(beside - height) < 13 for other, height in labels):
            beside += 13
        labels.append((x, beside))
        _text(svg, x - 9 if right else x + 9, beside, name, "end" if right else "start", "strong")
    _axis_title(svg, "MiB")
    caption = "Mean KL of the logits, logarithmic, over the bundle's bytes: the lower and the further left, the better."
    return Plot("Quality against size", caption, (), _done(svg))


def _canvas(label: str, height: float) -> ET.Element:
    return ET.Element("svg", {"viewBox": f"0 0 {WIDTH} {_n(height)}", "role": "img", "aria-label": label})


def _done(svg: ET.Element) -> str:
    return ET.tostring(svg, encoding="unicode", short_empty_elements=False)


def _n(value: float) -> str:
    return f"{value:.1f}"


def _bar(svg: ET.Element, x: float, y: float, width: float, height: float, style: str) -> ET.Element:
    place = {"x": _n(x), "y": _n(y), "width": _n(max(width, 0.0)), "height": _n(max(height, 0.0))}
    return ET.SubElement(svg, "rect", {**place, "rx": "2", "class": style})


def _line(svg: ET.Element, x1: float, y1: float, x2: float, y2: float, style: str) -> None:
    ET.SubElement(svg, "line", {"x1": _n(x1), "y1": _n(y1), "x2": _n(x2), "y2": _n(y2), "class": style})


def _text(svg: ET.Element, x: float, y: float, text: str, anchor: str, style: str = "label") -> None:
    ET.SubElement(svg, "text", {"x": _n(x), "y": _n(y), "text-anchor": anchor, "class": style}).text = text


def _hover(mark: ET.Element, text: str) -> None:
    ET.SubElement(mark, "title").text = text


def _grid(svg: ET.Element, y: float, label: str) -> None:
    _line(svg, LEFT, y, WIDTH - RIGHT, y, "grid")
    _text(svg, LEFT - 6, y + 4, label, "end")


def _limit_line(svg: ET.Element, y: float) -> None:
    _line(svg, LEFT, y, WIDTH - RIGHT, y, "limit")


def _layer_label(svg: ET.Element, x: float, layer: int, number: int, count: int) -> None:
    if number % max(1, math.ceil(count / 24)) == 0:
        _text(svg, x, TOP + DEEP + 15, str(layer), "middle")


def _axis_title(svg: ET.Element, text: str) -> None:
    _text(svg, (LEFT + WIDTH - RIGHT) / 2, TOP + DEEP + 30, text, "middle")
