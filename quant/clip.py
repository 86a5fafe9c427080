"""How the bound is chosen beyond which values are clipped: what a scale must get most nearly right. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ClipSearch:
    """The settings of the search for scales.

    Attributes:
        norm: scales have the least mean of `|x - code * scale| ** norm`, for weights and activations; at least 2.
        percentile: if set, static scales of activations hold so many percent of the values, and only those of weights
            are searched; above 0 and at most 100.
    """

    norm: float = 2.0
    percentile: float | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.norm < math.inf:
            raise ValueError(f"the norm of rounding errors must be at least 2, got {self.norm}")
        if self.percentile is not None and not 0 < self.percentile <= 100:
            raise ValueError(f"a percentile lies above 0 and at most at 100, got {self.percentile}")

    @classmethod
    def parse(cls, text: str) -> ClipSearch:
        """From "mse", "p" and a norm ("p2.4"), or a percentile ("99.99").

        Raises:
            ValueError: it is none of these, or out of range.
        """
        if text == "mse":
            return cls()
        try:
            number = float(text.removeprefix("p"))
        except ValueError:
            raise ValueError(
                f"{text!r} is neither mse, nor a norm such as p2.4, nor a percentile such as 99.99"
            ) from None
        return cls(norm=number) if text.startswith("p") else cls(percentile=number)

    def __str__(self) -> str:
        """As `parse` reads it."""
        if self.percentile is not None:
            return f"{self.percentile:.12g}"
        return "mse" if self.norm == 2 else f"p{self.norm:.12g}"
