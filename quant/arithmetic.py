"""The numeric specification of 4-bit: scales, rounding, packing and the integer product.

Everything that quantizes, and every engine that runs a 4-bit checkpoint, agrees with this module bit for bit.
It needs numpy only. The letters in names are shapes: N rows (tokens), K reduction, M outputs.

    q   = clip(rint(x / scale), -8, 7)         round half to even, symmetric, zero maps to zero
    y   = float32(sum_k q_x[k] * q_w[k]) * (s_x * s_w)    an exact integer sum, then one multiply

Both scales are bfloat16 numbers, one a tensor (`tensor_scale`), held as float32.

The sum needs no scale inside, and |sum| <= 64 * K, so every float32 partial sum of the integers is exact
while K <= 262,144. A BLAS, a tensor core with float32 accumulators and an int8 dot product give the same bits.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Q_MIN, Q_MAX = -8, 7
"""The range of a signed 4-bit code."""

MAX_REDUCTION = 2**24 // (Q_MIN * Q_MIN)
"""Largest K whose integer sum float32 holds exactly: 262,144."""

Codes = NDArray[np.int8] | NDArray[np.float32]
"""4-bit codes: whole numbers in [-8, 7], as int8 or widened to float32."""

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


def tensor_scale(absmax: float, name: str = "tensor") -> np.float32:
    """The scale that maps `absmax` to the code 7, made bfloat16-representable so that every runtime agrees on it.

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
    rounded = np.float32(round_to_bfloat16(np.float32(absmax) / np.float32(Q_MAX)))
    # A denormal absmax rounds to a zero scale, and one near the float32 limit to infinity; keep it a usable divisor.
    return np.float32(np.clip(rounded, BFLOAT16_TINY, BFLOAT16_MAX))


def quantize(values: NDArray[np.float32], scale: np.float32 | NDArray[np.float32]) -> NDArray[np.int8]:
    """Codes `clip(rint(values / scale), -8, 7)`, same shape, int8. The division is IEEE float32, not a reciprocal.

    Infinities saturate. NaN has no code: `values` must hold none (`quantized_linear` says what becomes of one).
    """
    with np.errstate(over="ignore"):  # a quotient beyond float32 saturates as well
        codes = np.rint(np.asarray(values, np.float32) / np.asarray(scale, np.float32))
    return np.clip(codes, Q_MIN, Q_MAX).astype(np.int8)


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


def integer_matmul(x_NK: NDArray[np.int8], w_MK: Codes) -> NDArray[np.int32]:
    """The exact sums `x_NK @ w_MK.T` of 4-bit codes, int32 [N, M].

    A float32 BLAS does the work: every partial sum is an integer below 2**24, hence exact in any order. Weight
    codes that are held as float32 spare their conversion in each call.

    Raises:
        ValueError: K exceeds `MAX_REDUCTION`.
    """
    if x_NK.shape[-1] > MAX_REDUCTION:
        raise ValueError(f"a reduction of {x_NK.shape[-1]} exceeds {MAX_REDUCTION}, beyond which float32 is not exact")
    return (x_NK.astype(np.float32) @ w_MK.astype(np.float32, copy=False).T).astype(np.int32)


def quantized_linear(
    x_NK: NDArray[np.float32], input_scale: np.float32, w_MK: Codes, w_scale: np.float32
) -> NDArray[np.float32]:
    """A W4A4 linear layer: quantize the rows, sum integers, multiply once. float32 [N, K] -> float32 [N, M].

    A row of `x_NK` that holds a NaN gives a row of NaN and leaves the others as they are.
    """
    nan_N1 = np.isnan(x_NK).any(axis=-1, keepdims=True)
    if nan_N1.any():
        x_NK = np.where(nan_N1, np.float32(0), x_NK)
    sums_NM = integer_matmul(quantize(x_NK, input_scale), w_MK).astype(np.float32)
    y_NM = sums_NM * (np.float32(input_scale) * np.float32(w_scale))
    return np.where(nan_N1, np.float32(np.nan), y_NM) if nan_N1.any() else y_NM
