"""The charts of a report: throughput against latency, and how latencies are distributed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtime.loadtest.report_chart import BOTTOM, LEFT, RIGHT, TOP, Chart, Point, Series
from runtime.loadtest.report_numbers import Result, exact, figure, rate, sides, sweep_points
from runtime.loadtest.report_scale import LinearScale, LogScale, PercentileScale

FLOOR_MS = 0.1
"""Shorter times are drawn as this: there is next to none between pieces of an answer that come together."""

HEADROOM = 1.3
"""An axis goes on to so many times the SLO, so that there is room for its name."""

POINTS = 120
"""Of a distribution's curve: with more, the page grows and the curve looks the same."""

MOST_SHARE = 0.9999
"""The distributions end here, however many samples there are."""

SWEPT = {"p99_ttft_ms": ("TTFT", "ttft_ms"), "p99_tpot_ms": ("TPOT", "tpot_ms")}
"""What the sweep's charts show: its name there, for readers, and in the SLO."""

DISTRIBUTED = {"ttft_ms": "Time to first token (TTFT)", "itl_ms": "Inter-token latency (ITL)"}


def sweep_charts(result: Result) -> list[Chart]:
    """p99 latencies over output throughput, one point a request rate; none where nothing was swept."""
    charts = (_sweep_chart(result, key) for key in SWEPT)
    return [chart for chart in charts if chart is not None]


def _sweep_chart(result: Result, key: str) -> Chart | None:
    name, slo_key = SWEPT[key]
    series = [_swept(letter, side, key, name) for letter, side in sides(result).items()]
    points = [point for curve in series for point in curve.points]
    if not points:
        return None
    slo = (result["workload"].get("slo") or {}).get(slo_key)
    values = [point.y for point in points] + ([slo / HEADROOM, slo * HEADROOM] if slo else [])
    return Chart(
        key=f"sweep-{key.replace('_', '-')}",
        title=f"{name}, p99, over output throughput",
        description=f"One point for each request rate: output tokens/s across, 99th percentile of {name} upwards. "
        "The table of the sweep has the same figures.",
        x_title="output tokens/s",
        y_title=f"{name} p99, ms (logarithmic)",
        x=LinearScale.over([point.x for point in points], LEFT, RIGHT),
        y=LogScale.over(values, BOTTOM, TOP, floor=FLOOR_MS),
        series=series,
        limits=[(slo, f"SLO {exact(slo)} ms")] if slo else [],
    )


def _swept(letter: str, side: Mapping[str, Any], key: str, name: str) -> Series:
    points = [
        Point(
            x=point["output_throughput"],
            y=point[key],
            text=f"{letter}, {rate(point['request_rate'])} requests/s: {figure(point['output_throughput'])} tokens/s, "
            f"{name} p99 {figure(point[key])} ms",
            hollow=not point.get("meets_slo", True),
        )
        for point in sweep_points(side)
        if point.get("output_throughput") and point.get(key)  # where nothing was completed there is nothing to draw
    ]
    return Series(letter, points)


def distribution_charts(result: Result) -> list[Chart]:
    """Percentiles of TTFT and ITL over all repeats' samples; none where the result has no samples."""
    charts = (_distribution_chart(result, key) for key in DISTRIBUTED)
    return [chart for chart in charts if chart is not None]


def _distribution_chart(result: Result, key: str) -> Chart | None:
    samples = {letter: pooled_samples(side, key) for letter, side in sides(result).items()}
    samples = {letter: values for letter, values in samples.items() if values}
    if not samples:
        return None
    counts = " and ".join(f"{len(values):,} ({letter})" for letter, values in samples.items())
    shares = {letter: min(1 - 0.5 / len(values), MOST_SHARE) for letter, values in samples.items()}
    y = PercentileScale.up_to(max(shares.values()), BOTTOM, TOP)
    series = [
        Series(letter, _percentiles(values, shares[letter], y), marked=False) for letter, values in samples.items()
    ]
    return Chart(
        key=f"distribution-{key.replace('_', '-')}",
        title=DISTRIBUTED[key],
        description=f"Percentiles of {counts} samples: milliseconds across, share of samples that took no longer "
        "upwards, the tail stretched. The table of latencies has mean, median, p90 and p99.",
        x_title="ms (logarithmic)",
        y_title="share that took no longer (tail stretched)",
        x=LogScale.over([point.x for curve in series for point in curve.points], LEFT, RIGHT, floor=FLOOR_MS),
        y=y,
        series=series,
    )


def pooled_samples(side: Mapping[str, Any], key: str) -> list[float]:
    """The samples of all repeats together, ms."""
    return [value for repeat in side.get("repeats") or () for value in (repeat.get("samples") or {}).get(key) or ()]


def _percentiles(values: Sequence[float], most: float, y: PercentileScale) -> list[Point]:
    """Points of the curve, evenly spread along its axis; the last is the largest sample unless there are very many."""
    shares = PercentileScale(y.low, most, y.start, y.end).shares(POINTS)
    return [
        Point(float(quantile), share)
        for quantile, share in zip(np.quantile(values, shares, method="hazen"), shares, strict=True)
    ]
