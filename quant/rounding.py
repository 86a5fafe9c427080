"""Round to nearest: a weight matrix to 4-bit codes under the clip bound with the least squared error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quant import arithmetic
from quant.histogram import Histogram


@dataclass(frozen=True, slots=True)
class RoundedWeight:
    """A weight matrix in codes, and what was lost.

    Attributes:
        codes: int8 [M, K], exactly `arithmetic.quantize(weight, scale)`.
        scale: bfloat16-representable; 1 for a zero matrix.
        mse: mean of `(weight - codes * scale)^2`, in float64.
        clip_ratio: `7 * scale / absmax`; 1 for a zero matrix.
        absmax: of the weight.
    """

    codes: NDArray[np.int8]
    scale: np.float32
    mse: float
    clip_ratio: float
    absmax: float


def round_to_nearest(weight_MK: NDArray[np.floating], name: str) -> RoundedWeight:
    """Rounds a bfloat16, float16 or float32 matrix [M, K] with one scale.

    Raises:
        NonFiniteError: a weight is NaN or infinite; the message has `name`.
    """
    histogram = Histogram()
    histogram.add(weight_MK, name)
    choice = histogram.choose_scale(name)
    values_MK = weight_MK.astype(np.float32)
    codes_MK = arithmetic.quantize(values_MK, choice.scale)
    errors_MK = values_MK - codes_MK.astype(np.float64) * float(choice.scale)
    return RoundedWeight(
        codes_MK, choice.scale, float(np.square(errors_MK).mean()), choice.clip_ratio, histogram.absmax
    )
