"""Scales, ticks and the parts that every plot is made of, as SVG elements.

A drawing library would bring megabytes for three plots; elements are built as a tree and not as strings, so that whatever stands
in a label is escaped. Sizes are in units of a 480 wide view box: the page scales it, and enlarges the text on a phone.
"""

from __future__ import annotations

import itertools
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 480
LEFT, RIGHT = 62, 14
"""Room for the tick labels of the vertical axis at the size that they have on a phone, and for half a tick label."""

Element = ElementTree.Element


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values from [low, high] to units from [start, end]; `log` spaces ratios equally."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(end) for end in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (value - low) / (high - low) * (self.end - self.start) if high > low else (self.start + self.end) / 2


def nice_ticks(low: float, high: float, num: int = 5) -> list[float]:
    """Round values (1, 2, 2.5 or 5 times a power of ten apart) within [low, high], about `num` of them."""
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / num))
    step = min((factor * power for factor in (1, 2, 2.5, 5, 10)), key=lambda step: abs((high - low) / step - num))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """As many decimals as tell the ticks apart, the same for all; thousands with commas."""
    if len(ticks) < 2:
        return [f"{tick:g}" for tick in ticks]
    step = min(after - before for before, after in itertools.pairwise(ticks))
    decimals = next((count for count in range(7) if abs(round(step, count) - step) < step * 1e-6), 6)
    return [f"{tick:,.{decimals}f}" for tick in ticks]


def padded(values: Sequence[float], share: float = 0.08) -> tuple[float, float]:
    """The range of the values with room at both ends; never empty."""
    low, high = min(values), max(values)
    room = share * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def drawing(name: str, height: float, title: str, description: str) -> Element:
    """An empty picture that a screen reader announces by `title` and `description`."""
    svg = Element("svg", {
        "viewBox": f"0 0 {WIDTH} {_units(height)}", "role": "img", "class": f"plot {name}",
        "aria-labelledby": f"{name}-title {name}-description",
    })  # fmt: skip
    ElementTree.SubElement(svg, "title", {"id": f"{name}-title"}).text = title
    ElementTree.SubElement(svg, "desc", {"id": f"{name}-description"}).text = description
    return svg


def style(parent: Element, rules: str) -> None:
    """Rules of its own, for a picture that stands outside the page."""
    ElementTree.SubElement(parent, "style").text = rules


def group(parent: Element, kind: str) -> Element:
    return ElementTree.SubElement(parent, "g", {"class": kind})


def line(parent: Element, kind: str, x1: float, y1: float, x2: float, y2: float) -> None:
    ends = {name: _units(value) for name, value in {"x1": x1, "y1": y1, "x2": x2, "y2": y2}.items()}
    ElementTree.SubElement(parent, "line", {"class": kind, **ends})


def text(parent: Element, kind: str, x: float, y: float, content: str, anchor: str = "start") -> None:
    attributes = {"class": kind, "x": _units(x), "y": _units(y), "text-anchor": anchor}
    ElementTree.SubElement(parent, "text", attributes).text = content


def dot(parent: Element, kind: str, x: float, y: float, radius: float = 5) -> None:
    ElementTree.SubElement(parent, "circle", {"class": kind, "cx": _units(x), "cy": _units(y), "r": _units(radius)})


def polyline(parent: Element, kind: str, points: Sequence[tuple[float, float]]) -> None:
    ElementTree.SubElement(parent, "polyline", {"class": kind, "points": _pairs(points)})


def polygon(parent: Element, kind: str, points: Sequence[tuple[float, float]]) -> None:
    ElementTree.SubElement(parent, "polygon", {"class": kind, "points": _pairs(points)})


def vertical_axis(parent: Element, scale: Scale, title: str, num_ticks: int = 5) -> None:
    """Grid lines with their values, and the title above the plot (turned text is hard to read)."""
    text(parent, "axis-title", 2, scale.end - 14, title)
    ticks = nice_ticks(scale.low, scale.high, num_ticks)
    for tick, label in zip(ticks, tick_labels(ticks)):
        line(parent, "grid", LEFT, scale(tick), WIDTH - RIGHT, scale(tick))
        text(parent, "tick", LEFT - 8, scale(tick) + 5, label, "end")


def horizontal_axis(parent: Element, scale: Scale, y: float, ticks: Sequence[float], labels: Sequence[str], title: str) -> None:
    """The axis line, a mark for every tick, a label wherever there is room for one, and the title below."""
    line(parent, "axis", scale.start, y, scale.end, y)
    free_from = -math.inf
    for tick, label in zip(ticks, labels):
        line(parent, "axis", scale(tick), y, scale(tick), y + 5)
        half = 5 * len(label) + 3
        if scale(tick) - half >= free_from:
            text(parent, "tick", min(scale(tick), WIDTH - half), y + 22, label, "middle")
            free_from = scale(tick) + half
    text(parent, "axis-title", (scale.start + scale.end) / 2, y + 45, title, "middle")


def markup(svg: Element) -> str:
    """The picture as HTML source, escaped."""
    return ElementTree.tostring(svg, encoding="unicode")


def _pairs(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{_units(x)},{_units(y)}" for x, y in points)


def _units(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
