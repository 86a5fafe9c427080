"""A histogram of a tensor's values, and the symmetric scale of 4 or 8 bits that loses least of them.

The bins are the bfloat16 numbers: 65,536 of them, about 0.8 % wide, sign included. Memory is bounded, one pass
over the values is enough, no range has to be known beforehand, and for bfloat16 weights nothing is lost at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quant import arithmetic

BINS = 2**16
CHUNK = 2**16
"""Values that are counted at a time: their copies then stay in the cache."""


class PercentileError(ValueError):
    """A percentile of magnitudes that is zero and bounds nothing; the message names the tensor and the percentile."""


@dataclass(frozen=True, slots=True)
class ScaleChoice:
    """A scale with what it costs.

    Attributes:
        scale: bfloat16-representable, > 0.
        clip_ratio: the bound `highest code * scale` as a share of the absmax; up to 0.8 % above 1 where `scale` was
            rounded up. 1 where all values are zero.
        mse: mean squared error of the values in the histogram, in squared units of the tensor.
    """

    scale: np.float32
    clip_ratio: float
    mse: float


class Histogram:
    """Counts values by their nearest bfloat16. `absmax` is exact, not the centre of a bin."""

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)
        self.absmax = 0.0

    @property
    def total(self) -> int:
        """How many values were added."""
        return int(self.counts.sum())

    def add(self, values: NDArray[np.floating], name: str) -> None:
        """Adds every value of an array of any shape.

        Raises:
            NonFiniteError: a value is NaN or infinite; `name` says of what.
        """
        arithmetic.require_finite(values, name)
        flat = values.reshape(-1)
        for start in range(0, flat.size, CHUNK):
            chunk = flat[start : start + CHUNK].astype(np.float32)
            self.absmax = max(self.absmax, float(np.abs(chunk).max()))
            with np.errstate(over="ignore"):  # `choose_scale` brings what rounds to infinity back
                bits = chunk.astype(ml_dtypes.bfloat16).view(np.uint16)
            self.counts += np.bincount(bits, minlength=BINS)

    def choose_scale(self, name: str, bits: int = 4, norm: float = 2.0, percentile: float | None = None) -> ScaleChoice:
        """The bfloat16 scale with the least error, or that of a percentile.

        The error is the mean of `|x - code * scale| ** norm`. It has many local minima where values are few, so every
        scale between two bounds is tried. The upper one is the first that clips nothing; beyond it, steps only grow.
        The lower one has its clip bound at half the mean magnitude; a scale s below it loses to its double. For let
        L be the highest code, and x a magnitude. The error under s is at least (x - (L + 1) s)+, that under 2 s at
        most the larger of s and (x - 2 L s)+. Raised to a norm of at least 2, the difference of the two clipped parts
        is a convex function of x, so its mean is at least its value at the mean x. Where that is at least 2 L s, the
        value is ((L - 1) s) ** norm or more, and that exceeds s ** norm.

        Args:
            name: what to call the tensor in an error.
            norm: 2 for the mean squared error; larger weighs clipped values more. At least 2.
            percentile: of the magnitudes, above 0 and at most 100; it is the clip bound, and nothing is searched.

        Raises:
            PercentileError: so many values are zero that the percentile is.
            ValueError: `norm` or `percentile` is out of range.
        """
        require_norm(norm)
        if self.absmax == 0:
            return ScaleChoice(arithmetic.tensor_scale(0, name, bits), 1.0, 0.0)
        filled = np.flatnonzero(self.counts)
        values = np.clip(bfloat16_numbers(filled), -arithmetic.BFLOAT16_MAX, arithmetic.BFLOAT16_MAX)
        shares = self.counts[filled] / self.total

        if percentile is None:
            mean_magnitude = float(shares @ np.abs(values).astype(np.float64))
            first, last = scale_patterns(np.array([mean_magnitude / 2, self.absmax], np.float32), bits)
            candidates = bfloat16_numbers(np.arange(min(first, last), last + 1))
            errors = [_mean_error(values, shares, scale, bits, norm) for scale in candidates]
            scale = candidates[len(errors) - 1 - int(np.argmin(errors[::-1]))]  # of equals the one that clips least
        else:
            scale = arithmetic.tensor_scale(self._percentile(percentile, name), name, bits)
        return ScaleChoice(scale, clip_ratio(scale, self.absmax, bits), _mean_error(values, shares, scale, bits, 2.0))

    def _percentile(self, percentile: float, name: str) -> float:
        """The least magnitude that so many percent of the values do not exceed, to the width of a bin."""
        if not 0 < percentile <= 100:
            raise ValueError(f"a percentile lies above 0 and at most at 100, got {percentile}")
        # The lower 15 bits of a bfloat16 count up with its magnitude; the highest one is the sign.
        cumulative = np.cumsum(self.counts[: BINS // 2] + self.counts[BINS // 2 :])
        # As it is written: in binary, 99.9 % of 20,000 is a little more than 19,980.
        magnitude = int(np.searchsorted(cumulative, math.ceil(Fraction(str(percentile)) / 100 * self.total)))
        bound = float(bfloat16_numbers(np.array([magnitude]))[0])
        if bound == 0:
            raise PercentileError(
                f"{name}: {percentile:.12g} % of the values are zero, so that this percentile of their magnitudes "
                "bounds nothing; name a higher one, or have scales searched (--clip mse)"
            )
        return min(bound, self.absmax)


def require_norm(norm: float) -> None:
    """Raises `ValueError` unless the exponent of rounding errors is one that scales can be searched by."""
    if not 2 <= norm < math.inf:
        raise ValueError(f"the norm of rounding errors must be at least 2, got {norm}")


def clip_ratio(scale: np.float32, absmax: float, bits: int = 4) -> float:
    """The largest magnitude that `scale` holds with the highest code, as a share of `absmax` > 0."""
    return arithmetic.code_range(bits)[1] * float(scale) / absmax


def scale_patterns(bounds: NDArray[np.float32], bits: int) -> NDArray[np.int32]:
    """The bit pattern of the first bfloat16 scale that clips nothing up to each bound, and that may be a scale.

    The patterns of positive numbers count upward as the numbers do: one more is the next larger scale.
    """
    quotients = bounds / np.float32(arithmetic.code_range(bits)[1])
    quotients = np.clip(quotients, arithmetic.BFLOAT16_TINY, arithmetic.BFLOAT16_MAX)
    upper_half: NDArray[np.int32] = (quotients.view(np.int32) + 0xFFFF) >> 16
    return upper_half


def bfloat16_numbers(patterns: NDArray[np.int32] | NDArray[np.int64]) -> NDArray[np.float32]:
    """The numbers of bit patterns, widened to float32."""
    numbers: NDArray[np.float32] = patterns.astype(np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    return numbers


def _mean_error(
    values: NDArray[np.float32], shares: NDArray[np.float64], scale: np.float32, bits: int, norm: float
) -> float:
    errors = np.abs(values.astype(np.float64) - arithmetic.quantize(values, scale, bits) * float(scale))
    return float(shares @ (np.square(errors) if norm == 2 else errors**norm))
