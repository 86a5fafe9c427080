"""The result on a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from runtime.loadtest.result import LoadTestResult, Ratio, Side

ROWS = {
    "output_throughput": "output tokens/s",
    "request_goodput": "good requests/s",
    "median_ttft_ms": "median TTFT, ms",
    "p99_ttft_ms": "p99 TTFT, ms",
    "median_tpot_ms": "median TPOT, ms",
    "p99_tpot_ms": "p99 TPOT, ms",
    "peak_rss_MB": "peak RSS, MB",
}
NAME, COLUMN = 26, 14


def as_text(result: LoadTestResult) -> str:
    """A table of the most telling figures, and what is wrong with them."""
    return "\n".join(_lines(result))


def _lines(result: LoadTestResult) -> Iterator[str]:
    sides = [side for side in (result.A, result.B) if side]
    yield (
        f"{'':<{NAME}}"
        + "".join(f"{side.name[: COLUMN - 1]:>{COLUMN}}" for side in sides)
        + ("  A over B" if result.B else "")
    )
    for name, title in ROWS.items():
        yield _row(title, [_figure(side, name) for side in sides], result.ratio.get(name))
    saturated = [side.saturation.output_throughput if side.saturation else None for side in sides]
    yield _row("tokens/s at saturation", saturated, result.ratio.get("saturation_output_throughput"))
    good = [side.max_rate_at_slo.request_goodput if side.max_rate_at_slo else None for side in sides]
    yield _row("goodput at service level", good, result.ratio.get("slo_request_goodput"))
    perplexity = result.quality.get("perplexity")
    if perplexity:
        ratio = Ratio(perplexity["ratio"], None, None) if perplexity["ratio"] else None
        yield _row("perplexity", [perplexity[letter] for letter in "AB"[: len(sides)]], ratio)
    else:
        yield f"quality was not measured: {result.quality.get('unavailable') or '; '.join(result.quality['reasons'])}"
    for reason in result.invalid_reasons:
        yield f"NOT VALID: {reason}"


def _figure(side: Side, name: str) -> float | None:
    value = side.medians().get(name, getattr(side, name, None))
    return None if value is None else float(value)


def _row(title: str, values: list[float | None], ratio: Ratio | None) -> str:
    cells = "".join(f"{'-' if value is None else f'{value:,.2f}':>{COLUMN}}" for value in values)
    return f"{title:<{NAME}}{cells}" + (f"  {_ratio(ratio)}" if ratio else "")


def _ratio(ratio: Ratio) -> str:
    interval = "" if ratio.low is None or ratio.high is None else f" ({ratio.low:.2f} to {ratio.high:.2f})"
    return f"{ratio.median:.2f} x{interval}"
