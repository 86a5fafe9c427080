"""The tables of a report. The page and the Markdown both write these, so that they say the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from runtime.loadtest.report_numbers import (
    METRICS,
    NOT_MEASURED,
    Metric,
    Ratio,
    Result,
    exact,
    figure,
    percent,
    perplexity_figure,
    quality_reasons,
    rate,
    reading,
    sides,
    sweep_points,
    yes_no,
)

LATENCIES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2EL"}
STATISTICS = ("mean", "std", "median", "p90", "p95", "p99")

REPEATED = ("output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms")

Sides = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Cell:
    """What stands in a place of a table, and what is to be known about it."""

    text: str
    note: str = ""

    @property
    def is_missing(self) -> bool:
        """Whether there is no figure."""
        return self.text == NOT_MEASURED


@dataclass(frozen=True)
class Table:
    """The first column names the row; the others hold figures, or text where `prose`.

    Where it `compares`, columns are sides, under names that may be long.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    prose: bool = False
    compares: bool = False


def headline(result: Result) -> Table:
    """Every figure that both sides have, and A over B."""
    measured = sides(result)
    ratios: Mapping[str, Any] = result.get("ratio") or {}
    rows = [_metric_row(metric, measured, ratios.get(metric.key)) for metric in METRICS]
    rows.append(_perplexity_row(result["quality"], measured))
    if "B" in measured:
        caption, columns = "Medians of the repeats; A / B with its 95 % interval", ("", *_titles(measured), "A / B")
    else:
        caption, columns = "Medians of the repeats", ("", *_titles(measured))
    return Table(caption, columns, tuple(rows), compares=True)


def _metric_row(metric: Metric, measured: Sides, ratio: Ratio | None) -> tuple[Cell, ...]:
    cells = [Cell(metric.name, metric.unit), *(Cell(metric.write(side)) for side in measured.values())]
    if "B" in measured:
        cells.append(Cell(f"{figure(ratio['median'])} x", reading(metric, ratio)) if ratio else Cell(NOT_MEASURED))
    return tuple(cells)


def _perplexity_row(quality: Mapping[str, Any], measured: Sides) -> tuple[Cell, ...]:
    perplexity: Mapping[str, Any] = quality.get("perplexity") or {}
    reason = quality_reasons(quality)
    cells = [Cell("Perplexity"), *(_or_reason(perplexity_figure(perplexity.get(side)), reason) for side in measured)]
    if "B" in measured:
        ratio = perplexity.get("ratio")
        cells.append(Cell(NOT_MEASURED) if ratio is None else Cell(f"{figure(ratio, 4)} x", "on the same text"))
    return tuple(cells)


def latencies(result: Result) -> Table:
    """Mean, deviation and percentiles of every latency, ms."""
    rows = (
        _row(f"{name}, {letter}", *(figure(side.get(f"{statistic}_{key}_ms")) for statistic in STATISTICS))
        for key, name in LATENCIES.items()
        for letter, side in sides(result).items()
    )
    return Table("Milliseconds, medians of the repeats", ("", *STATISTICS), tuple(rows))


def sweep(result: Result) -> Table:
    """What each request rate gave."""
    rows = (
        _row(
            f"{letter}, {rate(point['request_rate'])}",
            exact(point.get("completed")),
            figure(point.get("output_throughput")),
            figure(point.get("median_ttft_ms")),
            figure(point.get("p99_ttft_ms")),
            figure(point.get("p99_tpot_ms")),
            yes_no(point.get("meets_slo")),
        )
        for letter, side in sides(result).items()
        for point in sweep_points(side)
    )
    columns = (
        "requests/s",
        "completed",
        "tokens/s",
        "TTFT median, ms",
        "TTFT p99, ms",
        "TPOT p99, ms",
        "meets the SLO",
    )
    return Table("One row a rate", columns, tuple(rows))


def limits(result: Result) -> Table:
    """What a side gives at most, and what it gives within the SLO."""
    rows = []
    for letter, side in sides(result).items():
        saturation = side.get("saturation") or {}
        at_slo = side.get("max_rate_at_slo") or {}
        rows.append(
            _row(
                f"{letter}: {side['name']}",
                figure(saturation.get("output_throughput")),
                rate(saturation["request_rate"]) if saturation else NOT_MEASURED,
                rate(at_slo["request_rate"]) if at_slo else NOT_MEASURED,
                figure(at_slo.get("request_goodput")),
            )
        )
    columns = ("", "most tokens/s", "at requests/s", "highest requests/s within the SLO", "goodput there, requests/s")
    return Table("Limits found by the sweep", columns, tuple(rows))


def repeats(result: Result) -> Table:
    """Every repeat for itself, in the order in which sides took turns."""
    measured = sides(result)
    count = max((len(side.get("repeats") or ()) for side in measured.values()), default=0)
    rows = (
        _row(
            f"{index + 1}, {letter}",
            *(exact(side["repeats"][index].get(key)) for key in ("completed", "failed")),
            *(figure(side["repeats"][index].get(key)) for key in REPEATED),
        )
        for index in range(count)
        for letter, side in measured.items()
        if index < len(side.get("repeats") or ())
    )
    columns = ("", "completed", "failed", "tokens/s", "TTFT median, ms", "TTFT p99, ms", "TPOT median, ms")
    return Table("One row a repeat", columns, tuple(rows))


def quality(result: Result) -> Table:
    """Perplexity of the sides on one text, and how far their answers are the same."""
    measured: Mapping[str, Any] = result["quality"]
    reason = quality_reasons(measured)
    perplexity: Mapping[str, Any] = measured.get("perplexity") or {}
    agreement: Mapping[str, Any] = measured.get("token_agreement") or {}
    rows = [
        (Cell(f"Perplexity, {letter}"), _or_reason(perplexity_figure(perplexity.get(letter)), reason))
        for letter in sides(result)
    ]
    rows.append((Cell("Tokens of the text"), _or_reason(exact(perplexity.get("tokens")), reason)))
    if "B" in sides(result):
        rows += [
            (Cell("Perplexity, A / B"), _or_reason(figure(perplexity.get("ratio"), 4), reason)),
            (Cell("Answers that are the same"), _or_reason(_equal_texts(agreement), reason)),
            (
                Cell("Share of tokens before the first difference"),
                _or_reason(percent(agreement.get("matching_prefix_share")), reason),
            ),
            (Cell("Tokens of these answers"), _or_reason(exact(agreement.get("tokens")), reason)),
        ]
    return Table("Perplexity on one text, answers to the same prompts", ("", "value"), tuple(rows))


def _equal_texts(agreement: Mapping[str, Any]) -> str:
    if agreement.get("equal_texts") is None:
        return NOT_MEASURED
    return f"{exact(agreement['equal_texts'])} of {exact(agreement['prompts'])}"


def _or_reason(text: str, reason: str) -> Cell:
    return Cell(text, reason if text == NOT_MEASURED else "")


def _titles(measured: Sides) -> list[str]:
    return [f"{letter}: {side['name']}" for letter, side in measured.items()]


def _row(name: str, *figures: str) -> tuple[Cell, ...]:
    return (Cell(name), *(Cell(text) for text in figures))


def pairs(caption: str, rows: Iterable[tuple[str, str]]) -> Table:
    """A table of names and what they are."""
    return Table(caption, ("", "value"), tuple(_row(*pair) for pair in rows), prose=True)


def checks(result: Result) -> Table:
    """Whether the client kept up, and whether it and the servers count alike."""
    rows = []
    for letter, side in sides(result).items():
        client: Mapping[str, Any] = side.get("client") or {}
        metrics: Mapping[str, Any] = side.get("server_metrics") or {}
        why = "; ".join(metrics.get("differences") or ())
        if metrics.get("agrees") is None:
            why = "the server has no metrics that can be compared"
        rows.append(
            (
                Cell(f"{letter}: {side['name']}"),
                Cell(percent(client.get("cpu_share"))),
                Cell(figure(client.get("loop_lag_p99_ms"))),
                Cell(yes_no(metrics.get("agrees")), why),
            )
        )
    columns = ("", "client's share of a core", "client's lag p99, ms", "server's metrics agree")
    return Table("The client and the servers", columns, tuple(rows))


def served(result: Result) -> Table:
    """What was loaded, side by side."""
    measured = sides(result)
    keys = ("target", "url", "engine", "precision", "kernel", "threads", "energy_sources")
    names = ("Target", "URL", "Engine", "Precision", "Kernel", "Threads", "Energy of")
    rows = (
        _row(name, *(_plain(side.get(key)) for side in measured.values()))
        for key, name in zip(keys, names, strict=True)
    )
    return Table("What was served", ("", *_titles(measured)), tuple(rows), prose=True, compares=True)


def described(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and values of settings."""
    for key, value in values.items():
        yield key.replace("_", " "), _plain(value)


def _plain(value: Any) -> str:
    if value is None:
        return "not known"
    if isinstance(value, bool):
        return yes_no(value)
    if isinstance(value, float):
        return exact(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key.replace('_', ' ')} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "none"
    return str(value)
