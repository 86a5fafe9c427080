"""Rates from idle to saturated, and the highest at which the service level holds."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence

from runtime.loadtest.figures import Figures, ServiceLevel
from runtime.loadtest.result import RateAtSlo, Saturation, SweepPoint

START_SHARE = 1 / 8
"""Of the throughput in a closed loop: the rate that the sweep begins with."""

KEPT_SHARE = 0.9
"""A server that answers a smaller share of the requests a second that arrive is saturated."""

OVERLOADED_SHARE = 0.5
"""Below this one there is nothing to learn from a higher rate, be the service level kept or not."""

MOST_DOUBLINGS = 8
RESOLUTION = 1.15
"""The bisection ends when the rate that fails is so many times the one that holds, or less."""

MOST_BISECTIONS = 4

MeasureRate = Callable[[float], Awaitable[Figures]]
"""Puts the server under so many requests a second, and gives the figures."""


class Sweep:
    """The points of one side, as they are measured: a sweep that is cut off leaves what there is.

    Attributes:
        points: in the order in which they were measured.
    """

    def __init__(self, measure: MeasureRate, slo: ServiceLevel) -> None:
        self.points: list[SweepPoint] = []
        self._measure, self._slo = measure, slo

    async def run(self, request_throughput: float) -> None:
        """Doubles the rate until the server is saturated and the service level fails, then bisects.

        Args:
            request_throughput: of a closed loop, requests a second: it sets where to begin.
        """
        rate = request_throughput * START_SHARE
        for _ in range(MOST_DOUBLINGS):
            point = await self._at(rate)
            kept = point.request_throughput / rate
            if kept < OVERLOADED_SHARE or (kept < KEPT_SHARE and not point.meets_slo):
                break
            rate *= 2
        await self._bisect()

    async def _bisect(self) -> None:
        """Narrows the gap between the highest rate that holds and the lowest one that fails."""
        for _ in range(MOST_BISECTIONS):
            failed = lowest_failing(self.points)
            held = max_rate_at_slo(self.points)
            if held is None or math.isinf(failed) or failed / held.request_rate <= RESOLUTION:
                return
            await self._at(math.sqrt(held.request_rate * failed))

    async def _at(self, rate: float) -> SweepPoint:
        point = sweep_point(rate, await self._measure(rate), self._slo)
        self.points.append(point)
        return point


def sweep_point(rate: float, figures: Figures, slo: ServiceLevel) -> SweepPoint:
    """The point that the figures of one rate make."""
    ttft_ms, tpot_ms = figures.get("p99_ttft_ms"), figures.get("p99_tpot_ms")
    return SweepPoint(
        request_rate=rate,
        completed=int(figures["completed"]),
        failed=int(figures["failed"]),
        request_throughput=figures["request_throughput"],
        request_goodput=figures["request_goodput"],
        output_throughput=figures["output_throughput"],
        median_ttft_ms=figures.get("median_ttft_ms"),
        p99_ttft_ms=ttft_ms,
        median_tpot_ms=figures.get("median_tpot_ms"),
        p99_tpot_ms=tpot_ms,
        meets_slo=not figures["failed"]
        and ttft_ms is not None
        and ttft_ms <= slo.ttft_ms
        and (tpot_ms or 0.0) <= slo.tpot_ms,
    )


def saturation(points: Sequence[SweepPoint], repeats: Figures, repeats_rate: float | None) -> Saturation | None:
    """The most output tokens a second of all rates and of the repeats, if there are any."""
    seen = [Saturation(point.output_throughput, point.request_rate) for point in points]
    if "output_throughput" in repeats:
        seen.append(Saturation(repeats["output_throughput"], repeats_rate))
    return max(seen, key=lambda one: one.output_throughput, default=None)


def lowest_failing(points: Sequence[SweepPoint]) -> float:
    """The lowest rate that missed the service level; infinite where none did."""
    return min((point.request_rate for point in points if not point.meets_slo), default=math.inf)


def max_rate_at_slo(points: Sequence[SweepPoint]) -> RateAtSlo | None:
    """The highest rate below every one that failed; None where even the lowest failed."""
    held = [point for point in points if point.meets_slo and point.request_rate < lowest_failing(points)]
    best = max(held, key=lambda point: point.request_rate, default=None)
    return RateAtSlo(best.request_rate, best.request_goodput) if best else None
