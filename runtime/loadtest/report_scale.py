"""Where a figure lies on an axis: linear, logarithmic, or percentiles with the tail stretched."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

MANTISSAS = (1, 2, 5)
"""The round numbers of a decade."""

FEWEST_TICKS = 4
"""Of a logarithmic axis, if it is long enough to have so many."""


@dataclass(frozen=True)
class Scale(ABC):
    """Maps [low, high] of the data onto pixels from `start` to `end`; what lies outside is drawn at the edge."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        low, high = self._straighten(self.low), self._straighten(self.high)
        share = (self._straighten(min(max(value, self.low), self.high)) - low) / (high - low)
        return self.start + share * (self.end - self.start)

    @abstractmethod
    def _straighten(self, value: float) -> float:
        """What is proportional to the distance on the axis."""

    @abstractmethod
    def ticks(self) -> list[tuple[float, str]]:
        """Round values on the axis and what is written beside them."""


class LinearScale(Scale):
    """Equal differences are equally far apart."""

    @classmethod
    def over(cls, values: Iterable[float], start: float, end: float) -> LinearScale:
        """From 0 to a round number that no value exceeds."""
        largest = max(values, default=0.0) or 1.0
        step = _round_step(largest)
        return cls(0.0, step * math.ceil(largest / step - 1e-9), start, end)

    def _straighten(self, value: float) -> float:
        return value

    def ticks(self) -> list[tuple[float, str]]:
        step = _round_step(self.high)
        return [(step * i, f"{step * i:,.10g}") for i in range(round(self.high / step) + 1)]


class LogScale(Scale):
    """Equal ratios are equally far apart."""

    @classmethod
    def over(cls, values: Iterable[float], start: float, end: float, floor: float) -> LogScale:
        """From one round number to another, around all values; none under `floor` makes the axis longer."""
        positive = [max(value, floor) for value in values] or [floor]
        low, high = _round_down(min(positive)), _round_up(max(positive))
        return cls(low, high if high > low else 10 * low, start, end)

    def _straighten(self, value: float) -> float:
        return math.log10(value)

    def ticks(self) -> list[tuple[float, str]]:
        decades = range(math.floor(math.log10(self.low) + 1e-9), math.ceil(math.log10(self.high) - 1e-9) + 1)
        for mantissas in ((1,), (1, 5), MANTISSAS):
            values = [mantissa * 10.0**decade for decade in decades for mantissa in mantissas]
            inside = [value for value in values if self.low * 0.999 <= value <= self.high * 1.001]
            if len(inside) >= FEWEST_TICKS:
                break
        return [(value, f"{value:,.10g}") for value in inside]


class PercentileScale(Scale):
    """Shares in [0, 1): each further nine is as far as the one before, so that the tail can be read."""

    @classmethod
    def up_to(cls, share: float, start: float, end: float) -> PercentileScale:
        """From 0 to `share`, and at least to 99 %."""
        return cls(0.0, max(share, 0.99), start, end)

    def _straighten(self, value: float) -> float:
        return -math.log10(1 - value)

    def ticks(self) -> list[tuple[float, str]]:
        shares = (0.0, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999)
        return [(share, f"{100 * share:.10g} %") for share in shares if share <= self.high]

    def shares(self, count: int) -> list[float]:
        """`count` shares from `low` to `high`, equally far apart on the axis."""
        span = self._straighten(self.high)
        return [1 - 10 ** (-span * i / (count - 1)) for i in range(count)]


def _round_step(largest: float) -> float:
    """A round step with which an axis from 0 to `largest` has three to six of them."""
    decade = 10.0 ** math.floor(math.log10(largest))
    return next(step * decade for step in (0.2, 0.5, 1.0, 2.0) if largest / (step * decade) <= 5)


def _round_down(value: float) -> float:
    decade = 10.0 ** math.floor(math.log10(value))
    return max(m * decade for m in MANTISSAS if m * decade <= value * (1 + 1e-9))


def _round_up(value: float) -> float:
    decade = 10.0 ** math.floor(math.log10(value))
    return min(m * decade for m in (*MANTISSAS, 10) if m * decade >= value * (1 - 1e-9))
