"""How a report writes figures: digits, units, ratios with their intervals, and what was not measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Result = Mapping[str, Any]
"""A load test's `result.json`."""

Ratio = Mapping[str, Any]
"""A over B: "median", and the interval "low" to "high", which may be None."""

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Metric:
    """A figure that both sides have and that can be compared."""

    key: str
    """Its name among the ratios: that of `vllm bench serve` where that has it."""
    name: str
    unit: str
    more_is_better: bool
    per_unit: float = 1.0
    """How many of the result's units make one of `unit`."""
    place: tuple[str, ...] = ()
    """Where it stands in a side, if not under `key`."""

    def of(self, side: Mapping[str, Any]) -> float | None:
        """The side's value, None where it was not measured."""
        value: Any = side
        for name in self.place or (self.key,):
            value = None if value is None else value.get(name)
        return None if value is None else value / self.per_unit

    def write(self, side: Mapping[str, Any]) -> str:
        """The side's value in `unit`, without the unit."""
        return figure(self.of(side))


THROUGHPUT = Metric("output_throughput", "Output throughput", "tokens/s", more_is_better=True)
MEDIAN_TTFT = Metric("median_ttft_ms", "Time to first token (TTFT), median", "ms", more_is_better=False)
MEDIAN_TPOT = Metric("median_tpot_ms", "Time per output token (TPOT), median", "ms", more_is_better=False)
MEMORY = Metric("peak_rss_MB", "Peak resident memory", "MB", more_is_better=False)

METRICS = (
    THROUGHPUT,
    Metric("request_throughput", "Requests", "requests/s", more_is_better=True),
    Metric("request_goodput", "Requests within the SLO (goodput)", "requests/s", more_is_better=True),
    MEDIAN_TTFT,
    Metric("p99_ttft_ms", "TTFT, p99", "ms", more_is_better=False),
    MEDIAN_TPOT,
    Metric("p99_tpot_ms", "TPOT, p99", "ms", more_is_better=False),
    Metric("p99_itl_ms", "Inter-token latency (ITL), p99", "ms", more_is_better=False),
    Metric("median_e2el_ms", "Whole request (E2EL), median", "ms", more_is_better=False),
    Metric(
        "saturation_output_throughput",
        "Throughput at saturation",
        "tokens/s",
        more_is_better=True,
        place=("saturation", "output_throughput"),
    ),
    Metric(
        "slo_request_goodput",
        "Goodput at the highest rate within the SLO",
        "requests/s",
        more_is_better=True,
        place=("max_rate_at_slo", "request_goodput"),
    ),
    MEMORY,
    Metric("gpu_memory_MB", "GPU memory", "MB", more_is_better=False),
    Metric("weight_bytes", "Weight files", "MB", more_is_better=False, per_unit=1e6),
    Metric("load_seconds", "Time to load", "s", more_is_better=False),
    Metric("energy_J_per_token", "Energy", "J/token", more_is_better=False),
)
"""The headline table's rows, in its order."""


def figure(value: float | None, digits: int = 3) -> str:
    """A measured number: so many significant digits, and all digits before the point."""
    if value is None or not math.isfinite(value):
        return NOT_MEASURED
    if value == 0:
        return "0"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def perplexity_figure(value: float | None) -> str:
    """Perplexities are compared in their fourth digit."""
    return figure(value, digits=4)


def times(ratio: Ratio) -> str:
    """A ratio and its interval: `3.10 x (2.90 to 3.30)`."""
    between = interval(ratio)
    return f"{figure(ratio['median'])} x" + (f" ({between})" if between else "")


def interval(ratio: Ratio) -> str:
    """`2.90 to 3.30`; empty where there is none."""
    if ratio["low"] is None or ratio["high"] is None:
        return ""
    return f"{figure(ratio['low'])} to {figure(ratio['high'])}"


def shows_difference(ratio: Ratio) -> bool | None:
    """Whether the interval leaves out 1; None without an interval."""
    low, high = ratio["low"], ratio["high"]
    return None if low is None or high is None else low > 1 or high < 1


def reading(metric: Metric, ratio: Ratio) -> str:
    """What is to be known about a ratio of A over B: its interval, and what that says."""
    difference = shows_difference(ratio)
    if difference is None:
        return "no interval"
    if not difference:
        return f"{interval(ratio)}, no difference shown"
    better = "A" if (ratio["median"] > 1) == metric.more_is_better else "B"
    return f"{interval(ratio)}, {better} better"


def exact(value: float | None) -> str:
    """A number that was counted or chosen: no digits that say nothing."""
    return NOT_MEASURED if value is None else f"{value:,.10g}"


def service_level(result: Result) -> str:
    """The SLO in words; empty where there is none."""
    slo: Mapping[str, Any] = result["workload"].get("slo") or {}
    return ", ".join(f"{key.removesuffix('_ms').upper()} at most {exact(value)} ms" for key, value in slo.items())


def percent(share: float | None) -> str:
    """A share as a percentage."""
    return NOT_MEASURED if share is None else f"{figure(100.0 * share)} %"


def rate(requests_per_s: float | None) -> str:
    """A request rate; none is a closed loop, as many as the server takes."""
    return "closed loop" if requests_per_s is None else figure(requests_per_s)


def yes_no(value: bool | None) -> str:
    """Yes, no, or not measured."""
    return NOT_MEASURED if value is None else "yes" if value else "no"


def sweep_points(side: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """By rate: they were measured in another order."""
    return sorted(side.get("sweep") or (), key=lambda point: point["request_rate"])


def quality_reasons(quality: Mapping[str, Any]) -> str:
    """Why quality, or a part of it, was not measured; empty where nothing is known."""
    return str(quality.get("unavailable") or "; ".join(quality.get("reasons") or ()))


def sides(result: Result) -> dict[str, Mapping[str, Any]]:
    """The sides that were measured, by letter."""
    return {letter: result[letter] for letter in ("A", "B") if result.get(letter) is not None}


def side_names(result: Result) -> dict[str, str]:
    """What the sides are called in sentences: by name, with the letter where both have the same."""
    names = {letter: str(side["name"]) for letter, side in sides(result).items()}
    alike = len(set(names.values())) < len(names)
    return {letter: f"{name} ({letter})" if alike else name for letter, name in names.items()}
