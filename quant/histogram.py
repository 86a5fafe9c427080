"""A histogram of a tensor's values, and the symmetric 4-bit scale that loses least of them.

The bins are the bfloat16 numbers: 65,536 of them, about 0.8 % wide, sign included. Memory is bounded, one pass
over the values is enough, no range has to be known beforehand, and for bfloat16 weights nothing is lost at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quant import arithmetic

BINS = 2**16


@dataclass(frozen=True, slots=True)
class ScaleChoice:
    """A scale with what it costs.

    Attributes:
        scale: bfloat16-representable, > 0.
        clip_ratio: the bound `7 * scale` as a share of the absmax; up to 0.4 % above 1 where `scale` was rounded up.
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
        if values.size == 0:
            return
        self.absmax = max(self.absmax, float(np.abs(values).max()))
        with np.errstate(over="ignore"):  # `choose_scale` brings what rounds to infinity back
            bits = values.astype(ml_dtypes.bfloat16).view(np.uint16)
        self.counts += np.bincount(bits.ravel(), minlength=BINS)

    def choose_scale(self, name: str) -> ScaleChoice:
        """The scale with the least squared error among all bfloat16 numbers that can be the best one.

        From above they are bounded by the scale that clips nothing. From below: a bound under half the mean
        magnitude clips away more than it keeps, so that no finer step can win. Between the two, every one is tried:
        a heavy tail wants a bound far below the absmax, and the error has many local minima where values are few.
        """
        unclipped = arithmetic.tensor_scale(self.absmax, name)
        if self.absmax == 0:
            return ScaleChoice(unclipped, 1.0, 0.0)
        filled = np.flatnonzero(self.counts)
        values = filled.astype(np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
        values = np.clip(values, -arithmetic.BFLOAT16_MAX, arithmetic.BFLOAT16_MAX)
        shares = self.counts[filled] / self.total

        mean_magnitude = float(shares @ np.abs(values).astype(np.float64))
        lowest = min(arithmetic.tensor_scale(mean_magnitude / 2, name), unclipped)
        scales = _bfloat16_between(lowest, unclipped)
        errors = [_mean_squared_error(values, shares, scale) for scale in scales]
        best = len(errors) - 1 - int(np.argmin(errors[::-1]))  # of equals the widest, which clips least
        return ScaleChoice(scales[best], clip_ratio(scales[best], self.absmax), errors[best])


def clip_ratio(scale: np.float32, absmax: float) -> float:
    """The largest magnitude that `scale` holds with code 7, as a share of `absmax` > 0."""
    return arithmetic.Q_MAX * float(scale) / absmax


def _bfloat16_between(low: np.float32, high: np.float32) -> NDArray[np.float32]:
    # The bit patterns of positive floats count upward in the order of the numbers.
    first, last = (int(np.asarray(bound, ml_dtypes.bfloat16).view(np.uint16)) for bound in (low, high))
    bits = np.arange(first, last + 1, dtype=np.uint16)
    return np.asarray(bits.view(ml_dtypes.bfloat16), np.float32)


def _mean_squared_error(values: NDArray[np.float32], shares: NDArray[np.float64], scale: np.float32) -> float:
    errors = values.astype(np.float64) - arithmetic.quantize(values, scale) * float(scale)
    return float(shares @ np.square(errors))
