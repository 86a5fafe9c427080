"""Round to nearest: a weight matrix to codes of 4 or 8 bits, under the scales with the least error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quant import arithmetic
from quant.histogram import Histogram, bfloat16_numbers, require_norm, scale_patterns
from quant.weights import QuantizedWeight

CHUNK = 2**16
"""Weights that are worked on at a time: they and their errors then stay in the cache."""

COARSE_STEPS = 16
"""How many scales of a row are tried before the search closes in on the best of them."""

FINE_STEP = 2
"""Where it ends: bfloat16 scales so many apart differ by about 1 %."""


@dataclass(frozen=True, slots=True)
class RoundedWeight:
    """A weight matrix in codes, and what was lost.

    Attributes:
        weight: codes and scales.
        mse: mean of `(weight - codes * scale) ** 2`, in float64.
        clip_ratio: `highest code * scale / absmax`; with a scale a row, the mean of that over the rows. 1 where the
            absmax is zero.
        absmax: of the whole matrix.
    """

    weight: QuantizedWeight
    mse: float
    clip_ratio: float
    absmax: float

    @classmethod
    def from_codes(
        cls, weight_MK: NDArray[np.floating], codes_MK: NDArray[np.int8], scales: NDArray[np.float32], bits: int
    ) -> RoundedWeight:
        """Of codes that were found in whatever way, with float32 scales [1] or [M]."""
        squared = 0.0
        absmax_M = np.empty(len(weight_MK))
        for rows in _row_chunks(weight_MK):
            values_RK = weight_MK[rows].astype(np.float64)
            absmax_M[rows] = np.abs(values_RK).max(axis=1)
            values_RK -= codes_MK[rows] * _of_rows(scales, rows).astype(np.float64)
            squared += float(np.vdot(values_RK, values_RK))
        bounds = arithmetic.code_range(bits)[1] * scales.astype(np.float64)
        absmax = absmax_M if len(scales) > 1 else absmax_M.max(keepdims=True)
        ratios = np.divide(bounds, absmax, out=np.ones_like(absmax), where=absmax > 0)
        weight = QuantizedWeight.from_codes(codes_MK, bits, scales)
        return cls(weight, squared / weight_MK.size, float(ratios.mean()), float(absmax_M.max()))


def round_to_nearest(
    weight_MK: NDArray[np.floating],
    name: str,
    bits: int,
    granularity: str,
    norm: float = 2.0,
    scales: NDArray[np.float32] | None = None,
) -> RoundedWeight:
    """Rounds a bfloat16, float16 or float32 matrix [M, K]: `arithmetic.quantize` under `choose_scales`.

    Args:
        bits: 4 or 8.
        granularity: "tensor" (one scale) or "channel" (one a row).
        norm: exponent of the error that the scales minimize; see `Histogram.choose_scale`.
        scales: known already, float32 [1] or [M] as the granularity says; nothing is searched then.

    Raises:
        NonFiniteError: a weight is NaN or infinite; the message has `name`.
        ValueError: `scales` are no normal bfloat16 numbers above zero, or of another shape; the message has `name`.
    """
    if scales is None:
        scales = choose_scales(weight_MK, name, bits, granularity, norm)
    else:
        arithmetic.require_finite(weight_MK, name)
        _check_scales(scales, name, (1,) if granularity == "tensor" else weight_MK.shape[:1])
    codes_MK = np.empty(weight_MK.shape, np.int8)
    for rows in _row_chunks(weight_MK):
        codes_MK[rows] = arithmetic.quantize(weight_MK[rows], _of_rows(scales, rows), bits)
    return RoundedWeight.from_codes(weight_MK, codes_MK, scales, bits)


def choose_scales(
    weight_MK: NDArray[np.floating], name: str, bits: int, granularity: str, norm: float = 2.0
) -> NDArray[np.float32]:
    """The scales under which rounding [M, K] to the nearest codes loses least: float32, bfloat16-representable.

    The one of a tensor is searched in full (`Histogram.choose_scale`). Those of rows come from a grid that closes in:
    it loses a percent of error to a full search, or what happens to fit where a row has few distinct values.

    Returns:
        [1] for granularity "tensor", [M] for "channel". Zero tensors and zero rows have scale 1.

    Raises:
        NonFiniteError: a weight is NaN or infinite; the message has `name`.
        ValueError: another granularity, or `norm` is below 2.
    """
    if granularity not in ("tensor", "channel"):
        raise ValueError(f"{name}: scales are found by tensor or by channel, not by {granularity!r}")
    if granularity == "tensor":
        histogram = Histogram()
        histogram.add(weight_MK, name)
        return np.array([histogram.choose_scale(name, bits, norm).scale])
    require_norm(norm)
    arithmetic.require_finite(weight_MK, name)
    scales_M = np.empty(len(weight_MK), np.float32)
    for rows in _row_chunks(weight_MK):
        scales_M[rows] = _search_rows(weight_MK[rows].astype(np.float32), bits, norm)
    return scales_M


def _search_rows(rows_RK: NDArray[np.float32], bits: int, norm: float) -> NDArray[np.float32]:
    """A scale for each row, by a grid over the bit patterns of bfloat16, which count up with the numbers.

    The bounds are those of `Histogram.choose_scale`.
    """
    absmax_R1 = np.abs(rows_RK).max(axis=1, keepdims=True)
    # Powers of two bring the rows to an absmax of 0.5 to 1, where no square overflows and nothing is lost.
    exponents_R1 = np.frexp(absmax_R1)[1]
    rows_RK, absmax_R1 = np.ldexp(rows_RK, -exponents_R1), np.ldexp(absmax_R1, -exponents_R1)
    mean_R1 = np.abs(rows_RK).mean(axis=1, keepdims=True)
    lowest_R1, highest_R1 = (scale_patterns(bound_R1, bits) for bound_R1 in (mean_R1 / 2, absmax_R1))
    codes = arithmetic.code_range(bits)

    errors_RK = np.empty_like(rows_RK)

    def errors_of(patterns_R1: NDArray[np.int32]) -> NDArray[np.float32]:
        scales_R1 = bfloat16_numbers(patterns_R1)
        # `arithmetic.quantize` in place, as floats: this runs some 30 times over every weight.
        np.rint(np.divide(rows_RK, scales_R1, out=errors_RK), out=errors_RK)
        np.multiply(np.clip(errors_RK, *codes, out=errors_RK), scales_R1, out=errors_RK)
        np.subtract(rows_RK, errors_RK, out=errors_RK)
        if norm != 2:
            np.power(np.abs(errors_RK, out=errors_RK), np.float32(norm / 2), out=errors_RK)
        sums_R1: NDArray[np.float32] = np.einsum("rk,rk->r", errors_RK, errors_RK)[:, None]
        return sums_R1

    best_R1, least_R1 = highest_R1, errors_of(highest_R1)

    def try_patterns(patterns_R1: NDArray[np.int32]) -> None:
        nonlocal best_R1, least_R1
        patterns_R1 = np.clip(patterns_R1, lowest_R1, highest_R1)
        errors_R1 = errors_of(patterns_R1)
        better_R1 = errors_R1 < least_R1
        best_R1, least_R1 = np.where(better_R1, patterns_R1, best_R1), np.where(better_R1, errors_R1, least_R1)

    steps_R1 = -(-(highest_R1 - lowest_R1) // COARSE_STEPS)
    for i in range(1, COARSE_STEPS):
        try_patterns(highest_R1 - i * steps_R1)
    while (steps_R1 > FINE_STEP).any():
        steps_R1 = -(-steps_R1 // 4)
        around_R1 = best_R1
        for i in (-3, -2, -1, 1, 2, 3):
            try_patterns(around_R1 + i * steps_R1)
    scales_R1 = np.clip(
        np.ldexp(bfloat16_numbers(best_R1), exponents_R1), arithmetic.BFLOAT16_TINY, arithmetic.BFLOAT16_MAX
    )
    chosen_R1: NDArray[np.float32] = np.where(absmax_R1 == 0, np.float32(1), scales_R1)
    return chosen_R1[:, 0]


def _check_scales(scales: NDArray[np.float32], name: str, shape: tuple[int, ...]) -> None:
    if scales.shape != shape or scales.dtype != np.float32:
        raise ValueError(f"{name}: scales are {scales.dtype} {list(scales.shape)}, expected float32 {list(shape)}")
    normal = (scales >= arithmetic.BFLOAT16_TINY) & (scales <= arithmetic.BFLOAT16_MAX)
    wrong = ~(normal & (arithmetic.round_to_bfloat16(scales) == scales))
    if wrong.any():
        raise ValueError(f"{name}: a scale must be a normal bfloat16 number above zero, got {scales[wrong][0]}")


def _row_chunks(weight_MK: NDArray[np.floating]) -> Iterator[slice]:
    rows = max(1, CHUNK // weight_MK.shape[1])
    for start in range(0, len(weight_MK), rows):
        yield slice(start, start + rows)


def _of_rows(scales: NDArray[np.float32], rows: slice) -> NDArray[np.float32]:
    return scales[:, None] if len(scales) == 1 else scales[rows, None]
