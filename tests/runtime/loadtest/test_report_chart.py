"""Charts, read off as a reader does: by the two nearest labels of an axis."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_result import comparison

from runtime.loadtest.report_chart import BOTTOM, LEFT, RIGHT, TOP, Chart, Point, Series
from runtime.loadtest.report_curves import distribution_charts, pooled_samples, sweep_charts
from runtime.loadtest.report_scale import LinearScale, LogScale, PercentileScale, Scale

Straighten = Callable[[float], float]


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return comparison()


def straight(value: float) -> float:
    return value


def nines(percent: float) -> float:
    return -math.log10(1 - percent / 100)


def labels(svg: ET.Element, axis: str) -> list[tuple[float, float]]:
    """(pixel, value) of the labels below or beside the axes."""
    ends = {"x": "small middle", "y": "small end"}
    texts = [text for text in svg.iter("text") if text.get("class") == ends[axis]]
    found = []
    for text in texts:
        written = (text.text or "").replace(",", "").removesuffix(" %")
        if written.replace(".", "", 1).isdigit():
            x, y = float(text.get("x", "")), float(text.get("y", ""))
            found.append(
                (x if axis == "x" else y - 4, float(written))
            )  # letters are 8 high, their middle is on the line
    return found


def read_off(svg: ET.Element, axis: str, pixel: float, straighten: Straighten) -> float:
    """The straightened value at a pixel, from the first and the last label."""
    (p0, v0), *_, (p1, v1) = sorted(labels(svg, axis))
    share = (pixel - p0) / (p1 - p0)
    return straighten(v0) + share * (straighten(v1) - straighten(v0))


def marks(svg: ET.Element, letter: str) -> list[tuple[float, float, bool]]:
    """(x, y, hollow) of a side's marks: circles are A's, squares B's."""
    if letter == "A":
        found = [(float(m.get("cx", "")), float(m.get("cy", "")), m) for m in svg.iter("circle")]
    else:
        found = [(float(m.get("x", "")) + 4, float(m.get("y", "")) + 4, m) for m in svg.iter("rect")]
    return [(x, y, "hollow" in (mark.get("class") or "")) for x, y, mark in found]


def line(svg: ET.Element, letter: str) -> list[tuple[float, float]]:
    (polyline,) = (
        group.find("polyline") for group in svg.iter("g") if f"side-{letter.lower()}" in group.get("class", "")
    )
    assert polyline is not None
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in polyline.get("points", "").split())]


@pytest.mark.parametrize(("index", "key"), [(0, "p99_ttft_ms"), (1, "p99_tpot_ms")])
def test_points_of_the_sweep_lie_where_the_axes_say(result: dict[str, Any], index: int, key: str) -> None:
    svg = ET.fromstring(sweep_charts(result)[index].to_svg())
    for letter in ("A", "B"):
        points = sorted(result[letter]["sweep"], key=lambda point: point["request_rate"])
        drawn = marks(svg, letter)
        assert len(drawn) == len(points)
        for (x, y, hollow), point in zip(drawn, points, strict=True):
            assert read_off(svg, "x", x, straight) == pytest.approx(point["output_throughput"], rel=1e-3)
            assert 10 ** read_off(svg, "y", y, math.log10) == pytest.approx(point[key], rel=2e-3)
            assert hollow is not point["meets_slo"]
        np.testing.assert_allclose(line(svg, letter), [(x, y) for x, y, _ in drawn], atol=0.01)


def test_the_limit_is_drawn_where_the_slo_is(result: dict[str, Any]) -> None:
    svg = ET.fromstring(sweep_charts(result)[0].to_svg())
    (limit,) = (element for element in svg.iter("line") if element.get("class") == "limit")
    assert 10 ** read_off(svg, "y", float(limit.get("y1", "")), math.log10) == pytest.approx(2000, rel=2e-3)
    (text,) = (text for text in svg.iter("text") if text.text == "SLO 2,000 ms")
    left, right, y = float(text.get("x", "")) - 50, float(text.get("x", "")) + 50, float(text.get("y", "")) - 4
    for letter in ("A", "B"):
        across = [(x, at) for x, at, _ in marks(svg, letter) if left < x < right]
        assert not [at for _, at in across if abs(at - y) < 12], "what is written on it covers a mark"


@pytest.mark.parametrize(("index", "key"), [(0, "ttft_ms"), (1, "itl_ms")])
def test_curves_of_distributions_count_the_samples(result: dict[str, Any], index: int, key: str) -> None:
    """At every point: the share of samples that took no longer is what the axis says."""
    svg = ET.fromstring(distribution_charts(result)[index].to_svg())
    for letter in ("A", "B"):
        samples = np.array(pooled_samples(result[letter], key))
        for x, y in line(svg, letter):
            ms = 10 ** read_off(svg, "x", x, math.log10)
            share = 1 - 10 ** -read_off(svg, "y", y, nines)
            # A pixel's hundredth is 0.1 per mille of a latency and a thousandth of a nine.
            low, high = np.mean(samples < ms * 0.999), np.mean(samples <= ms * 1.001)
            slack = 1 / len(samples) + 0.002 * (1 - share)
            assert low - slack <= share <= high + slack


def test_one_stall_in_a_hundred_is_seen() -> None:
    side = {"repeats": [{"samples": {"ttft_ms": [20.0 + i / 100 for i in range(99)] + [3000.0], "itl_ms": []}}]}
    (chart,) = distribution_charts({"A": side, "B": None})
    svg = ET.fromstring(chart.to_svg())
    x, y = line(svg, "A")[-1]
    assert 10 ** read_off(svg, "x", x, math.log10) == pytest.approx(3000, rel=0.01)
    assert y == pytest.approx(TOP, abs=1)


def test_pieces_that_come_together_do_not_stretch_the_axis() -> None:
    side = {"repeats": [{"samples": {"ttft_ms": [], "itl_ms": [0.0, 0.001] * 20 + [20.0, 30.0] * 20}}]}
    (chart,) = distribution_charts({"A": side, "B": None})
    assert (chart.x.low, chart.x.high) == (0.1, 50.0)
    svg = ET.fromstring(chart.to_svg())
    assert line(svg, "A")[0][0] == LEFT


def test_one_answer_of_one_token_can_be_drawn() -> None:
    side = {"repeats": [{"samples": {"ttft_ms": [12.5], "itl_ms": [0.0]}}]}
    for chart in distribution_charts({"A": side, "B": None}):
        ET.fromstring(chart.to_svg())


def test_rates_that_nothing_came_of_are_left_out(result: dict[str, Any]) -> None:
    point = dict(result["A"]["sweep"][0], p99_ttft_ms=None, p99_tpot_ms=None)
    for chart in sweep_charts({**result, "A": {"sweep": [point]}}):
        assert [len(series.points) for series in chart.series] == [0, len(result["B"]["sweep"])]
        ET.fromstring(chart.to_svg())
    assert sweep_charts({**result, "A": {"sweep": [point]}, "B": None}) == []


def test_labels_of_curves_that_end_together_lie_apart() -> None:
    chart = Chart(
        key="k",
        title="t",
        description="d",
        x_title="x",
        y_title="y",
        x=LinearScale(0, 10, LEFT, RIGHT),
        y=LinearScale(0, 10, BOTTOM, TOP),
        series=[Series("A", [Point(10, 10)]), Series("B", [Point(10, 10)])],
    )
    svg = ET.fromstring(chart.to_svg())
    a, b = (float(text.get("x", "")) for text in svg.iter("text") if text.get("class", "").startswith("label"))
    assert abs(a - b) >= 14


positive = st.floats(1e-3, 1e7)


@given(st.lists(positive, min_size=1))
def test_a_linear_axis_holds_its_values(values: list[float]) -> None:
    scale = LinearScale.over(values, 0, 100)
    assert scale.low == 0
    assert max(values) <= scale.high * (1 + 1e-9)
    check_ticks(scale, fewest=3, most=7)
    assert [scale(share * scale.high) for share in (0, 0.25, 1)] == pytest.approx([0, 25, 100])


@given(st.lists(positive, min_size=1))
def test_a_logarithmic_axis_holds_its_values(values: list[float]) -> None:
    scale = LogScale.over(values, 0, 100, floor=0.01)
    assert scale.low <= max(min(values), 0.01) * (1 + 1e-9)
    assert scale.high >= max(values) * (1 - 1e-9)
    check_ticks(scale, fewest=2, most=10)
    assert scale(math.sqrt(scale.low * scale.high)) == pytest.approx(50)


@given(st.floats(0, 0.99999))
def test_a_percentile_axis_gives_each_nine_the_same_room(most: float) -> None:
    scale = PercentileScale.up_to(most, 0, 100)
    assert scale(0.9) - scale(0) == pytest.approx(scale(0.99) - scale(0.9))
    shares = scale.shares(50)
    assert (shares[0], shares[-1]) == pytest.approx((0, scale.high))
    assert np.diff([scale(share) for share in shares]) == pytest.approx(100 / 49)


def check_ticks(scale: Scale, fewest: int, most: int) -> None:
    """They lie on the axis, each is written once, and a reader has enough of them."""
    ticks = scale.ticks()
    assert fewest <= len(ticks) <= most
    assert len({text for _, text in ticks}) == len(ticks)
    for value, text in ticks:
        assert scale.low * 0.998 <= value <= scale.high * 1.002
        assert float(text.replace(",", "")) == pytest.approx(value)
