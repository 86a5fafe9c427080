"""The comparison with peers, as JSON and in Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.alternation import Series
from benchmarks.markdown import TIMES, section

LIMITS = {"read_GBps": "machine reads, GB/s", "dot_GOPS": "machine's dot products, GOPS"}


@dataclass(slots=True)
class Comparison:
    """What was measured, and how.

    Attributes:
        ours: the name of the engine that the others are compared with.
        engines: by name, what each says of itself, ours first.
        rss_mb: by name, the memory of the process at the end, in 10^6 bytes.
    """

    command: str
    shape: str
    threads: int
    rounds: int
    ours: str
    engines: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    series: list[Series] = field(default_factory=list)
    rss_mb: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All figures of all rounds, and their medians."""
        head = {name: getattr(self, name) for name in ("command", "shape", "threads", "rounds", "ours")}
        engines = {name: {**about, "rss_MB": self.rss_mb.get(name)} for name, about in self.engines.items()}
        return {**head, "engines": engines, "rows": [self._row(series) for series in self.series]}

    def markdown(self) -> str:
        """The command, the engines, and a table with a line for every row."""
        note = (
            f"Shape {self.shape}, {self.threads} threads, {self.rounds} rounds: medians of tokens a second, and in "
            f"brackets the median of the rounds' ratios, {self.ours} over the peer."
        )
        limits = [name for name in LIMITS if any(series.limits for series in self.series)]
        columns = ["", *self.engines, *(LIMITS[name] for name in limits)]
        lines = {
            series.row.title: [
                *(self._cell(series, name) for name in self.engines),
                *(_number(series.limit(name)) for name in limits),
            ]
            for series in self.series
        }
        engines = [f"- {name}: {', '.join(about.values())}" for name, about in self.engines.items()]
        return "\n".join([f"```\n{self.command}\n```\n", section("Peers", note, columns, lines), *engines, ""])

    def write(self, file: Path) -> None:
        """Writes both forms: JSON into `file`, Markdown beside it."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")
        file.with_suffix(".md").write_text(self.markdown(), encoding="utf-8")

    def _row(self, series: Series) -> dict[str, Any]:
        row, peers = series.row, [name for name in series.rates if name != self.ours]
        return {
            "name": row.name,
            "request": row.work.request(),
            "neighbour": row.neighbour,
            "goals": dict(row.goals),
            "kept_goal": row.kept_goal,
            "rates": series.rates,
            "quiet": series.quiet,
            "limits": series.limits,
            "medians": {name: series.rate(name) for name in series.rates},
            "ratios": {name: series.ratio(self.ours, name) for name in peers},
            "kept": {name: series.kept(name) for name in series.rates if series.quiet},
        }

    def _cell(self, series: Series, name: str) -> str:
        """ "15.5 (2.31 ×, goal 2.0)" for a peer; beside a neighbour "19.8, keeps 0.62 (goal 0.6)" for ours."""
        if name not in series.rates:
            return "cannot"
        kept, row = series.kept(name), series.row
        rate = _number(series.rate(name)) + ("" if kept is None else f", keeps {kept:.2f}")
        if name == self.ours:
            return rate + _brackets(None if row.kept_goal is None else f"goal {row.kept_goal}")
        goal = row.goals.get(name)
        ratio = f"{series.ratio(self.ours, name):.2f} {TIMES}"
        return rate + _brackets(ratio, None if goal is None else f"goal {goal}")


def _brackets(*parts: str | None) -> str:
    said: Sequence[str] = [part for part in parts if part is not None]
    return f" ({', '.join(said)})" if said else ""


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
