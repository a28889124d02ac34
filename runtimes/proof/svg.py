"""The parts that the plots of a page are drawn from: inline SVG, colours from the page's CSS, sizes in SVG units."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from dataclasses import dataclass

WIDTH, LEFT, RIGHT = 520, 68, 12  # the page scales the whole
TOP, DEEP, BOTTOM = 12, 190, 36  # space above the plot, its height, space below


@dataclass(frozen=True)
class Plot:
    """A titled SVG. `legend` pairs a CSS class of the marks with what they stand for."""

    title: str
    caption: str
    legend: tuple[tuple[str, str], ...]
    svg: str


def canvas(label: str, height: float) -> ET.Element:
    """An empty picture of `WIDTH` and this height; `label` says what it shows to those who do not see it."""
    return ET.Element("svg", {"viewBox": f"0 0 {WIDTH} {number(height)}", "role": "img", "aria-label": label})


def finish(svg: ET.Element) -> str:
    """The picture as text."""
    return ET.tostring(svg, encoding="unicode", short_empty_elements=False)


def number(value: float) -> str:
    """A coordinate."""
    return f"{value:.1f}"


def bar(svg: ET.Element, x: float, y: float, width: float, height: float, style: str) -> ET.Element:
    """A filled rectangle with round corners."""
    place = {"x": number(x), "y": number(y), "width": number(max(width, 0.0)), "height": number(max(height, 0.0))}
    return ET.SubElement(svg, "rect", {**place, "rx": "2", "class": style})


def dot(svg: ET.Element, x: float, y: float, radius: float, style: str) -> ET.Element:
    """A filled circle."""
    return ET.SubElement(svg, "circle", {"cx": number(x), "cy": number(y), "r": number(radius), "class": style})


def line(svg: ET.Element, x1: float, y1: float, x2: float, y2: float, style: str) -> None:
    """A line between two points."""
    place = {"x1": number(x1), "y1": number(y1), "x2": number(x2), "y2": number(y2)}
    ET.SubElement(svg, "line", {**place, "class": style})


def text(svg: ET.Element, x: float, y: float, words: str, anchor: str, style: str = "label") -> None:
    """Words whose start, middle or end (`anchor`) is at x."""
    place = {"x": number(x), "y": number(y), "text-anchor": anchor, "class": style}
    ET.SubElement(svg, "text", place).text = words


def hover(mark: ET.Element, words: str) -> None:
    """What a pointer over the mark shows."""
    ET.SubElement(mark, "title").text = words


def grid(svg: ET.Element, y: float, label: str) -> None:
    """A horizontal line with its label at the left."""
    line(svg, LEFT, y, WIDTH - RIGHT, y, "grid")
    text(svg, LEFT - 6, y + 4, label, "end")


def limit_line(svg: ET.Element, y: float) -> None:
    """A threshold."""
    line(svg, LEFT, y, WIDTH - RIGHT, y, "limit")


def axis_titles(svg: ET.Element, across: str, up: str, bottom: float = TOP + DEEP, left: float = LEFT) -> None:
    """What the axes count: `across` under the plot, which ends at `bottom`, `up` at its left, read from below."""
    text(svg, (left + WIDTH - RIGHT) / 2, bottom + 31, across, "middle")
    height = (TOP + bottom) / 2
    place = {"x": "11", "y": number(height), "text-anchor": "middle", "class": "label"}
    ET.SubElement(svg, "text", {**place, "transform": f"rotate(-90 11 {number(height)})"}).text = up


def label_every(svg: ET.Element, x: float, y: float, label: int, position: int, count: int) -> None:
    """A number under a mark, if it is one of the at most 24 of `count` that are labelled, fewer of three digits."""
    if position % max(1, math.ceil(count / (24 if count < 100 else 16))) == 0:
        text(svg, x, y, str(label), "middle")


def round_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most `most` round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`, both of them covered.

    The first is at or below `low`, the last at or above `high`: the axis runs from one to the other.
    """
    span = max(high - low, 1e-12)
    step = 10.0 ** math.floor(math.log10(span / most))
    for factor in (1, 2, 5, 10, 20):
        first, last = math.floor(low / (factor * step) + 1e-9), math.ceil(high / (factor * step) - 1e-9)
        if last - first < most:
            break
    return [index * factor * step for index in range(first, max(last, first + 1) + 1)]


def decades(low: float, high: float) -> tuple[int, int]:
    """The powers of ten that a logarithmic axis from `low` to `high` begins and ends at."""
    first = math.floor(math.log10(low))
    return first, max(math.ceil(math.log10(high)), first + 1)
