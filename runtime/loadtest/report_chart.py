"""A chart as SVG: thin grid, two series told apart by colour and by shape, labels on the curves themselves.

Colours and sizes of letters are classes of the page's style sheet, so that a chart follows the page into the dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.etree import ElementTree as ET

from runtime.loadtest.report_scale import Scale

WIDTH, HEIGHT = 440, 300
"""Of the drawing. A phone shows it 360 pixels wide: letters of 13 are then still read."""

LEFT, RIGHT, TOP, BOTTOM = 70, 418, 40, 252
"""Edges of what the axes enclose."""

NEAR = 16
"""Labels closer than this, in both directions, would lie on each other: the second moves aside by as much."""

LIMIT_TEXT = 110
"""About as wide is what is written on a limit."""

STEPS = 20
"""How finely a place for it is searched."""


@dataclass(frozen=True)
class Point:
    """One mark on a curve."""

    x: float
    y: float
    text: str = ""
    """What the mark says when it is pointed at."""
    hollow: bool = False


@dataclass(frozen=True)
class Series:
    """One curve. Its label is "A" or "B": the style sheet knows a colour for each."""

    label: str
    points: Sequence[Point]
    marked: bool = True
    """Whether the points are drawn, and not only the line through them."""


@dataclass(frozen=True)
class Chart:
    """What is drawn. `key` must be unique in a page."""

    key: str
    title: str
    description: str
    """What a reader who does not see the chart is told."""
    x_title: str
    y_title: str
    x: Scale
    y: Scale
    series: Sequence[Series]
    limits: Sequence[tuple[float, str]] = ()
    """Values of y with a dashed line and what is written on it."""

    def to_svg(self) -> str:
        """The drawing, one `<svg>` element, every text escaped."""
        root = ET.Element("svg", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img")
        root.set("aria-labelledby", f"{self.key}-title {self.key}-description")
        ET.SubElement(root, "title", id=f"{self.key}-title").text = self.title
        ET.SubElement(root, "desc", id=f"{self.key}-description").text = self.description
        self._draw_axes(root)
        for value, _ in self.limits:
            _line(root, (LEFT, self.y(value)), (RIGHT, self.y(value)), "limit")
        for series in self.series:
            self._draw_series(root, series)
        for value, text in self.limits:
            y = self.y(value) - 5
            _text(root, text, self._clearest(y - 4), y, "small middle")
        self._draw_labels(root)
        return ET.tostring(root, encoding="unicode")

    def _draw_axes(self, root: ET.Element) -> None:
        for value, text in self.y.ticks():
            y = self.y(value)
            _line(root, (LEFT, y), (RIGHT, y), "grid")
            _text(root, text, LEFT - 8, y + 4, "small end")
        for value, text in self.x.ticks():
            x = self.x(value)
            _line(root, (x, TOP), (x, BOTTOM), "grid")
            _text(root, text, x, BOTTOM + 18, "small middle")
        _text(root, self.y_title, 0, 16, "small")
        _text(root, self.x_title, RIGHT, HEIGHT - 8, "small end")

    def _draw_series(self, root: ET.Element, series: Series) -> None:
        group = ET.SubElement(root, "g", {"class": f"series side-{series.label.lower()}"})
        places = [(self.x(point.x), self.y(point.y)) for point in series.points]
        if len(places) > 1:
            ET.SubElement(group, "polyline", points=" ".join(f"{x:.2f},{y:.2f}" for x, y in places))
        if series.marked:
            for point, place in zip(series.points, places, strict=True):
                _mark(group, series.label, point, *place)

    def _clearest(self, y: float) -> float:
        """Where along a horizontal line the middle of a limit's text is farthest from every curve."""
        outline = [place for series in self.series for place in self._outline(series)]

        def clearance(x: float) -> float:
            return min((math.hypot(max(abs(x - px) - LIMIT_TEXT / 2, 0), y - py) for px, py in outline), default=0)

        first, last = LEFT + LIMIT_TEXT / 2, RIGHT - LIMIT_TEXT / 2
        return max((last + (first - last) * i / STEPS for i in range(STEPS + 1)), key=clearance)

    def _outline(self, series: Series) -> list[tuple[float, float]]:
        """Pixels along a curve, close together, its label included."""
        places = [(self.x(point.x), self.y(point.y)) for point in series.points]
        between = [
            (x0 + (x1 - x0) * i / STEPS, y0 + (y1 - y0) * i / STEPS)
            for (x0, y0), (x1, y1) in pairwise(places)
            for i in range(STEPS)
        ]
        return [*between, *places, *((x, y - NEAR) for x, y in places[-1:])]

    def _draw_labels(self, root: ET.Element) -> None:
        """Each series' label above its last point, or beside another label that is already there."""
        taken: list[tuple[float, float]] = []
        for series in self.series:
            if not series.points:
                continue
            x, y = self.x(series.points[-1].x), self.y(series.points[-1].y) - 10
            if any(abs(x - other_x) < NEAR and abs(y - other_y) < NEAR for other_x, other_y in taken):
                x += NEAR if x + 2 * NEAR < WIDTH else -NEAR
            taken.append((x, y))
            _text(root, series.label, x, y, f"label middle side-{series.label.lower()}")


def _mark(group: ET.Element, label: str, point: Point, x: float, y: float) -> None:
    """A circle for A, a square for B: colour is not the only thing that tells them apart."""
    if label == "A":
        mark = ET.SubElement(group, "circle", cx=f"{x:.2f}", cy=f"{y:.2f}", r="4.5")
    else:
        mark = ET.SubElement(group, "rect", x=f"{x - 4:.2f}", y=f"{y - 4:.2f}", width="8", height="8")
    mark.set("class", "mark hollow" if point.hollow else "mark")
    ET.SubElement(mark, "title").text = point.text


def _line(parent: ET.Element, start: tuple[float, float], end: tuple[float, float], kind: str) -> None:
    (x1, y1), (x2, y2) = start, end
    places = {"x1": f"{x1:.2f}", "y1": f"{y1:.2f}", "x2": f"{x2:.2f}", "y2": f"{y2:.2f}"}
    ET.SubElement(parent, "line", {**places, "class": kind})


def _text(parent: ET.Element, text: str, x: float, y: float, kind: str) -> None:
    ET.SubElement(parent, "text", {"x": f"{x:.2f}", "y": f"{y:.2f}", "class": kind}).text = text
