"""The numeric specification of quantized models: scales, rounding, packing, the integer product, the KV cache.

Everything that quantizes, and every engine that runs a quantized checkpoint, agrees with this module bit for bit.
It needs numpy only. The letters in names are shapes: N rows (tokens), K reduction, M outputs, C channels of a head.

    q   = clip(rint(x / scale), lowest, highest)   round half to even, symmetric, zero maps to zero
    y   = float32(sum_k q_x[k] * q_w[k]) * (s_x * s_w)    an exact integer sum, then one multiply

Codes of 4 bits lie in [-8, 7], those of 8 bits in [-128, 127]. A weight has one scale a tensor or one an output
channel; an input has one static scale a tensor, or one a token that is found as the token comes. No scale lies inside
the sum. Static scales are bfloat16 numbers held as float32 (`tensor_scale`); scales of tokens are float32.

For 4-bit codes |sum| <= 64 * K, so every float32 partial sum of the integers is exact while K <= 262,144: a BLAS, a
tensor core with float32 accumulators and an int8 dot product give the same bits. With 8-bit codes an engine sums in
int32, which is exact while K <= 131,071.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Q_MIN, Q_MAX = -8, 7
"""The range of a signed 4-bit code."""

MAX_REDUCTION = (2**31 - 1) // 2**14
"""Largest K whose sum of 8-bit products an int32 holds for certain: 131,071."""

Codes = NDArray[np.int8] | NDArray[np.float32] | NDArray[np.float64]
"""Whole numbers in the range of their bits, as int8 or widened to float."""

BFLOAT16_TINY, BFLOAT16_MAX = np.float32(2.0**-126), np.float32((2 - 2.0**-7) * 2.0**127)
"""The smallest normal and the largest finite bfloat16."""


class NonFiniteError(ValueError):
    """A NaN or an infinity where a weight, a scale or a calibrated range is expected; the message names it."""


def require_finite(values: NDArray[np.floating], name: str) -> None:
    """Raises `NonFiniteError`, naming the tensor and the first bad position, unless every value is finite."""
    finite = np.isfinite(values)
    if not finite.all():
        at = tuple(int(i) for i in np.argwhere(~finite)[0])
        bad = int(finite.size - np.count_nonzero(finite))
        raise NonFiniteError(f"{name}: {bad} of {finite.size} values are NaN or infinite, the first at index {at}")


def round_to_bfloat16(values: NDArray[np.float32] | np.float32) -> NDArray[np.float32]:
    """The nearest bfloat16 values (ties to even), as float32."""
    return np.asarray(values, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)


def code_range(bits: int) -> tuple[int, int]:
    """The lowest and the highest signed code of 4 or 8 bits.

    Raises:
        ValueError: other bits.
    """
    if bits not in (4, 8):
        raise ValueError(f"codes have 4 or 8 bits, not {bits}")
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def tensor_scale(absmax: float, name: str = "tensor", bits: int = 4) -> np.float32:
    """The scale that maps `absmax` to the highest code, made bfloat16-representable so that every runtime agrees on it.

    Weights and calibrated inputs alike have such a scale.

    Args:
        absmax: clip bound, >= 0. Zero (a zero tensor) gives scale 1.
        name: what to call the tensor in an error.

    Raises:
        NonFiniteError: `absmax` is not finite.
        ValueError: `absmax` is negative.
    """
    require_finite(np.asarray(absmax, np.float64), name)
    if absmax < 0:
        raise ValueError(f"{name}: the clip bound must not be negative, got {absmax}")
    if absmax == 0:
        return np.float32(1.0)
    rounded = np.float32(round_to_bfloat16(np.float32(absmax) / np.float32(code_range(bits)[1])))
    # A denormal absmax rounds to a zero scale, and one near the float32 limit to infinity; keep it a usable divisor.
    return np.float32(np.clip(rounded, BFLOAT16_TINY, BFLOAT16_MAX))


def token_scales(x_NK: NDArray[np.float32], bits: int = 4) -> NDArray[np.float32]:
    """The dynamic scale of every row: `absmax / highest code`, float32 [N, 1]; 1 for a zero row.

    A row that holds a NaN or an infinity has a NaN scale.
    """
    absmax_N1 = np.abs(x_NK).max(axis=-1, keepdims=True, initial=0)
    scales_N1 = np.maximum(absmax_N1 / np.float32(code_range(bits)[1]), BFLOAT16_TINY)
    scales_N1 = np.where(absmax_N1 == 0, np.float32(1), scales_N1)
    return np.where(np.isfinite(absmax_N1), scales_N1, np.float32(np.nan))


def quantize(values: NDArray[Any], scale: np.float32 | NDArray[np.float32], bits: int = 4) -> NDArray[np.int8]:
    """Codes `clip(rint(values / scale), lowest, highest)`, same shape, int8. The division is IEEE float32, not a
    multiplication by a reciprocal.

    Infinities saturate. NaN has no code: `values` must hold none (`quantized_linear` says what becomes of one).
    """
    with np.errstate(over="ignore"):  # a quotient beyond float32 saturates as well
        codes = np.rint(np.asarray(values, np.float32) / np.asarray(scale, np.float32))
    return np.clip(codes, *code_range(bits)).astype(np.int8)


def pack(codes_MK: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Two codes a byte along the last axis, the even index in the low nibble; an odd length is padded with a zero.

    Args:
        codes_MK: int8 [..., K] in [-8, 7].

    Returns:
        uint8 [..., ceil(K / 2)].

    Raises:
        ValueError: a code is outside [-8, 7].
    """
    if codes_MK.size and (codes_MK.min() < Q_MIN or codes_MK.max() > Q_MAX):
        raise ValueError(f"codes must lie in [{Q_MIN}, {Q_MAX}], got [{codes_MK.min()}, {codes_MK.max()}]")
    if codes_MK.shape[-1] % 2:
        codes_MK = np.concatenate([codes_MK, np.zeros((*codes_MK.shape[:-1], 1), np.int8)], axis=-1)
    nibbles = codes_MK.view(np.uint8) & np.uint8(0xF)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << np.uint8(4))


def unpack(packed: NDArray[np.uint8], length: int) -> NDArray[np.int8]:
    """The inverse of `pack`: int8 [..., length] from uint8 [..., ceil(length / 2)].

    Raises:
        ValueError: the packed width does not fit `length`, or the padding nibble is not zero.
    """
    if packed.shape[-1] != (length + 1) // 2:
        raise ValueError(f"{packed.shape[-1]} packed bytes a row do not hold {length} codes of 4 bits")
    codes = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.int8)
    # Shifting the nibble to the top and back as a signed byte extends its sign.
    codes[..., 0::2] = (packed << np.uint8(4)).view(np.int8) >> np.int8(4)
    codes[..., 1::2] = packed.view(np.int8) >> np.int8(4)
    if length % 2 and codes[..., -1].any():
        raise ValueError("the padding nibble of an odd row must be zero")
    return codes[..., :length]


def sum_dtype(in_features: int, input_bits: int, weight_bits: int) -> np.dtype[Any]:
    """The float type whose BLAS sums these products exactly: float32 where |sum| <= 2**24, else float64.

    Raises:
        ValueError: `in_features` exceeds `MAX_REDUCTION`, beyond which an int32 sum may overflow.
    """
    if in_features > MAX_REDUCTION:
        raise ValueError(f"a reduction of {in_features} exceeds {MAX_REDUCTION}, beyond which int32 sums may overflow")
    largest = in_features * code_range(input_bits)[0] * code_range(weight_bits)[0]
    return np.dtype(np.float32 if largest <= 2**24 else np.float64)


def integer_matmul(x_NK: NDArray[np.int8], w_MK: Codes, input_bits: int = 4, weight_bits: int = 4) -> NDArray[np.int32]:
    """The exact sums `x_NK @ w_MK.T` of codes, int32 [N, M].

    A BLAS of floats does the work: every partial sum is an integer that the type holds, hence exact in any order.
    Weight codes that are held in the type of `sum_dtype` spare their conversion in each call.

    Raises:
        ValueError: K exceeds `MAX_REDUCTION`.
    """
    dtype = sum_dtype(x_NK.shape[-1], input_bits, weight_bits)
    sums_NM: NDArray[Any] = x_NK.astype(dtype) @ w_MK.astype(dtype, copy=False).T
    return sums_NM.astype(np.int32)


def quantized_linear(
    x_NK: NDArray[np.float32],
    input_scale: np.float32 | None,
    w_MK: Codes,
    w_scale: np.float32 | NDArray[np.float32],
    input_bits: int = 4,
    weight_bits: int = 4,
) -> NDArray[np.float32]:
    """An integer linear layer: quantize the rows, sum integers, multiply once. float32 [N, K] -> float32 [N, M].

    Args:
        input_scale: the static scale; None for `token_scales`.
        w_MK: codes of `weight_bits`.
        w_scale: one for the tensor, or [M].

    A row that holds a NaN gives a row of NaN and leaves the others as they are. An infinity saturates under a static
    scale, and counts as a NaN where the row's scale follows from it.
    """
    scale_N1 = token_scales(x_NK, input_bits) if input_scale is None else np.float32(input_scale)
    lost_N1 = np.isnan(scale_N1) if input_scale is None else np.isnan(x_NK).any(axis=-1, keepdims=True)
    lost = bool(lost_N1.any())
    if lost:
        x_NK, scale_N1 = np.where(lost_N1, np.float32(0), x_NK), np.where(lost_N1, np.float32(1), scale_N1)
    codes_NK = quantize(x_NK, scale_N1, input_bits)
    sums_NM = integer_matmul(codes_NK, w_MK, input_bits, weight_bits).astype(np.float32)
    y_NM = sums_NM * (scale_N1 * np.asarray(w_scale, np.float32))
    return np.where(lost_N1, np.float32(np.nan), y_NM) if lost else y_NM


def quantize_kv(
    x_NC: NDArray[np.float32], bits: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
    """A head's key or value of each token, asymmetric: `x ~ (code - zero) * scale` with codes in [0, 2**bits - 1].

    The range is that of the head's C channels, widened to hold zero; its scale is rounded to a bfloat16 number first.

    Returns:
        codes uint8 [..., C], scales float32 [..., 1], zero points uint8 [..., 1]. A head that holds a NaN or an
        infinity has a NaN scale. A zero head has scale 1 and zero point 0.
    """
    code_range(bits)  # 4 or 8
    levels = np.float32(2**bits - 1)
    lowest_N1 = np.minimum(x_NC.min(axis=-1, keepdims=True), np.float32(0))
    highest_N1 = np.maximum(x_NC.max(axis=-1, keepdims=True), np.float32(0))
    # Each bound is divided by itself: their difference may overflow.
    scale_N1 = np.clip(round_to_bfloat16(highest_N1 / levels - lowest_N1 / levels), BFLOAT16_TINY, BFLOAT16_MAX)
    scale_N1 = np.where((lowest_N1 == 0) & (highest_N1 == 0), np.float32(1), scale_N1)
    lost_N1 = ~(np.isfinite(lowest_N1) & np.isfinite(highest_N1))
    x_NC, lowest_N1 = np.where(lost_N1, np.float32(0), x_NC), np.where(lost_N1, np.float32(0), lowest_N1)
    scale_N1 = np.where(lost_N1, np.float32(1), scale_N1)
    zero_N1 = np.clip(np.rint(-lowest_N1 / scale_N1), 0, levels)
    codes_NC = np.clip(np.rint(x_NC / scale_N1) + zero_N1, 0, levels).astype(np.uint8)
    return codes_NC, np.where(lost_N1, np.float32(np.nan), scale_N1), zero_N1.astype(np.uint8)


def dequantize_kv(
    codes_NC: NDArray[np.uint8], scale_N1: NDArray[np.float32], zero_N1: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """The inverse of `quantize_kv` up to rounding: float32 [..., C].

    The scale may have been rounded up, so that within 1/256 of float32's largest number a value may become infinite.
    """
    difference_NC = codes_NC.astype(np.float32) - zero_N1.astype(np.float32)
    with np.errstate(over="ignore"):
        values: NDArray[np.float32] = difference_NC * scale_N1
    return values
