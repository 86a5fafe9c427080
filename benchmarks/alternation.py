"""Engines measured in turn, A B C A B C, so that what a shared machine does meanwhile happens to all of them.

A ratio is taken within a round, and the median over the rounds is the result: rates of different rounds, minutes apart,
are never compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol

from benchmarks.neighbour import neighbour
from benchmarks.workloads import Row

SHORTEST_S = 0.5

Rates = dict[str, list[float]]
"""Tokens a second by the engine's name, one figure a round."""


class Engine(Protocol):
    """Who can be measured: a `benchmarks.worker_process.WorkerProcess`, or a test's."""

    name: str

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request of `benchmarks.worker`'s protocol."""
        ...


@dataclass(slots=True)
class Series:
    """What the rounds of a row came to.

    Attributes:
        rates: of the work of the row.
        quiet: of the same work without the row's neighbour, just before; empty where it has none.
        limits: what the machine could do before each round, `read_GBps` and `dot_GOPS`; empty where nobody measures.
    """

    row: Row
    rates: Rates = field(default_factory=dict)
    quiet: Rates = field(default_factory=dict)
    limits: list[dict[str, float]] = field(default_factory=list)

    def rate(self, name: str) -> float:
        """The engine's median, in tokens a second."""
        return median(self.rates[name])

    def ratio(self, name: str, other: str) -> float:
        """How many times the other's rate the engine reaches: the median of the rounds' ratios."""
        return median(one / two for one, two in zip(self.rates[name], self.rates[other], strict=True))

    def kept(self, name: str) -> float | None:
        """Which part of its rate the engine keeps beside the neighbour; None if there is none."""
        if not self.quiet:
            return None
        return median(busy / quiet for busy, quiet in zip(self.rates[name], self.quiet[name], strict=True))

    def limit(self, name: str) -> float | None:
        """The median of a limit of the machine; None where nobody measures."""
        return median(limits[name] for limits in self.limits) if self.limits else None


def alternate(
    row: Row,
    engines: Sequence[Engine],
    rounds: int,
    *,
    limits: Callable[[], dict[str, float]] | None = None,
    beside: Callable[[str], AbstractContextManager[object]] = neighbour,
) -> Series:
    """Measures a row, after a turn of each engine that does not count.

    Args:
        limits: measures what the machine can do.
        beside: starts a neighbour by its name, and ends it.

    Raises:
        WorkerError, NeighbourError: one of them failed.
        ValueError: a rate that is not positive.
    """
    series = Series(row)
    for engine in engines:
        _rate(engine, row)
    for _ in range(rounds):
        if limits is not None:
            series.limits.append(limits())
        if row.neighbour is not None:
            _turn(row, engines, series.quiet)
        with beside(row.neighbour) if row.neighbour is not None else nullcontext():
            _turn(row, engines, series.rates)
    return series


def _turn(row: Row, engines: Sequence[Engine], rates: Rates) -> None:
    for engine in engines:
        rates.setdefault(engine.name, []).append(_rate(engine, row))


def _rate(engine: Engine, row: Row) -> float:
    """Tokens a second over as many answers as last `SHORTEST_S` seconds: a small model is done in milliseconds."""
    tokens, seconds = 0, 0.0
    while seconds < SHORTEST_S:
        rate = float(engine.ask(row.work.request())["tok_s"])
        if not rate > 0:
            raise ValueError(f"{engine.name}, {row.name}: a rate of {rate} tokens a second")
        tokens += row.work.total_tokens
        seconds += row.work.total_tokens / rate
    return tokens / seconds
