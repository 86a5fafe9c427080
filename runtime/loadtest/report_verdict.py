"""The report in plain sentences: how much faster, and at what cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from runtime.loadtest.report_numbers import (
    MEDIAN_TPOT,
    MEDIAN_TTFT,
    MEMORY,
    THROUGHPUT,
    Result,
    exact,
    percent,
    perplexity_figure,
    quality_reasons,
    shows_difference,
    side_names,
    sides,
    times,
)

SAME_PERPLEXITY = 0.0005
"""Perplexities that differ by a smaller share than this are called the same."""

OTHER_FIGURES = {MEDIAN_TTFT: "median time to first token", MEDIAN_TPOT: "median time per output token"}


def verdict(result: Result) -> list[str]:
    """Sentences, the most important first."""
    names = side_names(result)
    compared = _compared(result, names) if "B" in names else _alone(result["A"], names["A"], result["quality"])
    return [*compared, *_failures(result, names)]


def _compared(result: Result, names: Mapping[str, str]) -> Iterator[str]:
    ratios: Mapping[str, Any] = result.get("ratio") or {}
    speed, cost = ratios.get(THROUGHPUT.key), _cost(result["quality"])
    a, b = names["A"], names["B"]
    if speed is not None and shows_difference(speed) is not False:
        yield f"{a} gives {times(speed)} the output tokens/s of {b}" + (f" and {cost}." if cost else ".")
    else:
        yield (
            f"{a} and {b} give the same output tokens/s as far as this run can tell: {times(speed)}."
            if speed is not None
            else f"The output tokens/s of {a} and {b} were not compared."
        )
        if cost:
            yield f"{a} {cost}."
    if speed is not None and shows_difference(speed) is None:
        yield "One repeat gives no interval: repeat before relying on it."
    if not cost:
        yield _cost_unknown(result["quality"], a)
    latencies = [f"its {words} is {times(ratios[m.key])}" for m, words in OTHER_FIGURES.items() if ratios.get(m.key)]
    if latencies:
        text = " and ".join(latencies)
        yield f"{text[0].upper()}{text[1:]} that of {b}."
    if ratios.get(MEMORY.key):
        yield f"It takes {times(ratios[MEMORY.key])} the memory of {b}."


def _alone(side: Mapping[str, Any], name: str, quality: Mapping[str, Any]) -> Iterator[str]:
    if THROUGHPUT.of(side) is None:
        yield f"The output tokens/s of {name} were not measured."
    else:
        yield f"{name} gives {THROUGHPUT.write(side)} output tokens/s."
    for metric, words in OTHER_FIGURES.items():
        if metric.of(side) is not None:
            yield f"Its {words} is {metric.write(side)} {metric.unit}."
    value = (quality.get("perplexity") or {}).get("A")
    yield f"Its perplexity is {perplexity_figure(value)}." if value else _cost_unknown(quality, name)


def _cost(quality: Mapping[str, Any]) -> str:
    """What A costs in perplexity, to follow its name; empty where it was not measured."""
    perplexity: Mapping[str, Any] = quality.get("perplexity") or {}
    ratio = perplexity.get("ratio")
    if ratio is None:
        return ""
    values = f"({perplexity_figure(perplexity['A'])} against {perplexity_figure(perplexity['B'])})"
    if abs(ratio - 1) < SAME_PERPLEXITY:
        return f"has the same perplexity {values}"
    if ratio > 1:
        return f"costs {percent(ratio - 1)} of perplexity {values}"
    return f"has a perplexity {percent(1 - ratio)} lower {values}"


def _cost_unknown(quality: Mapping[str, Any], name: str) -> str:
    reason = quality_reasons(quality)
    return f"The quality of {name} was not measured" + (f": {reason}." if reason else ".")


def _failures(result: Result, names: Mapping[str, str]) -> Iterator[str]:
    for letter, side in sides(result).items():
        if side.get("failed"):
            total = side["failed"] + side.get("completed", 0)
            yield f"{exact(side['failed'])} of {exact(total)} requests to {names[letter]} failed."
