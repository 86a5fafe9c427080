"""What a report consists of, in its order, without its looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.loadtest import report_tables as tables
from runtime.loadtest.report_chart import Chart
from runtime.loadtest.report_curves import FLOOR_MS, distribution_charts, sweep_charts
from runtime.loadtest.report_numbers import NOT_MEASURED, Result, service_level, sides
from runtime.loadtest.report_tables import Table


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    key: str
    title: str
    text: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    commands: Sequence[str] = ()


def sections(result: Result) -> list[Section]:
    """Every section; each says what it does not have and why."""
    return [
        _headline(result),
        _sweep(result),
        _distributions(result),
        _quality(result),
        _repeats(result),
        _machine(result),
        Section("commands", "Commands", commands=tuple(map(str, result["commands"]))),
        Section("method", "Method", text=_method(result)),
    ]


def _headline(result: Result) -> Section:
    title = "A against B" if "B" in sides(result) else "Figures"
    return Section("headline", title, tables=(tables.headline(result),))


def _sweep(result: Result) -> Section:
    charts = sweep_charts(result)
    if not charts:
        return Section("sweep", "Throughput against latency", (f"{NOT_MEASURED.capitalize()}: no rates were swept.",))
    text = (
        "Each point is a request rate. Further right and lower is better. Hollow points miss the SLO: "
        f"p99 of {service_level(result) or 'nothing'}, and no request failed.",
    )
    shown = (tables.limits(result), tables.sweep(result))
    return Section("sweep", "Throughput against latency", text, charts, shown)


def _distributions(result: Result) -> Section:
    charts = distribution_charts(result)
    text = (
        "The share of samples that took no longer, all repeats together. The tail is stretched: 90 %, 99 % and 99.9 % "
        f"are equally far apart. Less than {FLOOR_MS} ms is drawn as {FLOOR_MS} ms."
        if charts
        else f"Distributions: {NOT_MEASURED}, the result holds no samples."
    )
    return Section("latency", "Latency", (text,), charts, (tables.latencies(result),))


def _quality(result: Result) -> Section:
    reason = result["quality"].get("unavailable")
    text = (f"{NOT_MEASURED.capitalize()}: {reason}",) if reason else ()
    return Section("quality", "Quality", text, tables=() if reason else (tables.quality(result),))


def _repeats(result: Result) -> Section:
    return Section("repeats", "Repeats and checks", tables=(tables.repeats(result), tables.checks(result)))


def _machine(result: Result) -> Section:
    workload = {"request_rate": "none, a closed loop", "max_concurrency": "unlimited"}
    workload |= {key: value for key, value in result["workload"].items() if value is not None}
    workload["slo"] = service_level(result) or "none"
    return Section(
        "machine",
        "Machine and workload",
        tables=(
            tables.served(result),
            tables.pairs("The machine", tables.described(result["machine"])),
            tables.pairs("The workload", tables.described(workload)),
        ),
    )


def _method(result: Result) -> list[str]:
    """How the figures came about, as far as this run did it."""
    workload = result["workload"]
    open_loop = (
        "Requests arrive on a schedule that does not wait for answers (open loop), and a latency counts from the "
        "scheduled arrival, so that a server that stalls cannot hide it."
    )
    closed_loop = (
        "A request is sent when one before it has been answered (closed loop), and its latency counts from then. "
        "Those of the sweep arrive on a schedule that does not wait for answers (open loop), and theirs count from the "
        "scheduled arrival, so that a server that stalls cannot hide it."
    )
    turns = "The sides take turns, A B A B, and one at a time is loaded."
    halves = "Each side has half of the cores, and both are loaded at the same time."
    ratio = (
        "A / B is the median of the repeats' ratios; its 95 % interval is that of their geometric mean (Student's t of "
        "the logarithms). Where it holds 1, no difference was shown. What was measured once a side has no interval."
    )
    swept = (
        "The sweep raises the rate until the server is saturated, then narrows down the highest rate within the SLO."
    )
    return [
        closed_loop if workload.get("request_rate") is None else open_loop,
        *([f"{halves if workload.get('placement') == 'halves' else turns} {ratio}"] if "B" in sides(result) else []),
        "Figures have the names and definitions of vllm bench serve. TTFT: until the first token. TPOT: the rest of "
        "a request over its further tokens. ITL: each gap between two pieces of an answer. E2EL: the whole request. "
        "Goodput counts the requests that keep every limit of the SLO.",
        *([swept] if sweep_charts(result) else []),
        "A run is not valid if the client may have been the bottleneck, if requests of the repeats failed or were cut "
        "short, or if client and server count differently.",
    ]
