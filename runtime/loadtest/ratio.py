"""A over B: how many times one side's figure is the other's, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from runtime.loadtest.result import Ratio, Side

COMPARED = (
    "request_throughput",
    "output_throughput",
    "total_token_throughput",
    "request_goodput",
    *(f"{statistic}_{name}_ms" for name in ("ttft", "tpot", "itl", "e2el") for statistic in ("median", "p99")),
)
"""The figures of repeats that are compared."""

MEASURED_ONCE = ("peak_rss_MB", "gpu_memory_MB", "weight_bytes", "load_seconds", "energy_J_per_token")
"""The fields of a side that are compared, without an interval."""

_STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""The 97.5 % quantile of Student's t, for 1, 2, … degrees of freedom."""


def ratio_of_repeats(a_R: Sequence[float], b_R: Sequence[float]) -> Ratio | None:
    """A over B from R pairs of positive figures, each pair measured one after the other.

    What the two of a pair have in common, a neighbour or a hot processor, is not in their ratio. The interval is
    Student's, of the logarithms of the ratios, at 95 %; beyond ten degrees of freedom it is a little too wide.

    Returns:
        None where there is no pair, or a figure is not positive.
    """
    ratios_R = [a / b for a, b in zip(a_R, b_R, strict=False) if a > 0 and b > 0]
    if not ratios_R or len(ratios_R) < min(len(a_R), len(b_R)):
        return None
    median = float(np.median(ratios_R))
    if len(ratios_R) < 2:
        return Ratio(median, None, None)
    logs_R = np.log(ratios_R)
    t = _STUDENT_T[min(len(logs_R) - 1, len(_STUDENT_T)) - 1]
    half = t * float(np.std(logs_R, ddof=1)) / math.sqrt(len(logs_R))
    centre = float(np.mean(logs_R))
    return Ratio(median, math.exp(centre - half), math.exp(centre + half))


def ratios(a: Side, b: Side) -> dict[str, Ratio]:
    """Every figure that both sides have, A over B."""
    found: dict[str, Ratio] = {}
    for name in COMPARED:
        pairs = [
            (left.figures[name], right.figures[name])
            for left, right in zip(a.repeats, b.repeats, strict=False)
            if name in left.figures and name in right.figures
        ]
        if ratio := ratio_of_repeats([left for left, _ in pairs], [right for _, right in pairs]):
            found[name] = ratio
    for name in MEASURED_ONCE:
        left, right = getattr(a, name), getattr(b, name)
        if left and right:
            found[name] = Ratio(left / right, None, None)
    if a.saturation and b.saturation and b.saturation.output_throughput > 0:
        found["saturation_output_throughput"] = Ratio(
            a.saturation.output_throughput / b.saturation.output_throughput, None, None
        )
    if a.max_rate_at_slo and b.max_rate_at_slo and b.max_rate_at_slo.request_goodput > 0:
        found["slo_request_goodput"] = Ratio(
            a.max_rate_at_slo.request_goodput / b.max_rate_at_slo.request_goodput, None, None
        )
    return found
