"""Quantized keys and values against the specification in exact fractions, and against what a cache needs of them."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quant import arithmetic

BITS = st.sampled_from([4, 8])
LARGEST = 3.4028234663852886e38
HEADS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=1, max_dims=3, max_side=6),
    elements=st.one_of(st.floats(-8, 8, width=32), st.floats(width=32, allow_nan=False, allow_infinity=False)),
)


def by_the_book(head, bits):
    """Codes, scale and zero point of one head, each float32 operation spelled out; `round` goes half to even."""
    levels = 2**bits - 1
    lowest, highest = min(0, head.min()), max(0, head.max())
    if lowest == highest == 0:
        return [0] * len(head), np.float32(1), 0
    span = np.float32(highest) / np.float32(levels) - np.float32(lowest) / np.float32(levels)
    with np.errstate(over="ignore"):
        scale = np.float32(np.float32(span).astype(ml_dtypes.bfloat16))
    scale = min(max(scale, np.float32(2.0**-126)), np.float32((2 - 2.0**-7) * 2.0**127))

    def steps(value):
        return round(Fraction(float(np.float32(value) / scale)))

    zero = min(levels, max(0, steps(-lowest)))
    return [min(levels, max(0, steps(value) + zero)) for value in head], scale, zero


@given(HEADS, BITS)
@example(np.array([LARGEST, -LARGEST], np.float32), 4)
@example(np.array([[LARGEST, LARGEST]], np.float32), 8)
@example(np.array([3.4019931e38], np.float32), 4)  # becomes infinite, without a warning
@example(np.array([1e-45, -1e-45, 0], np.float32), 4)
@example(np.array([0.5, 1.5, 2.5, 15], np.float32), 4)  # ties
@example(np.array([-1, 0.5, 1.5, 14], np.float32), 4)  # ties beside an odd zero point
@pytest.mark.filterwarnings("error")
def test_heads_are_quantized_by_the_book(x_NC, bits):
    codes_NC, scale_N1, zero_N1 = arithmetic.quantize_kv(x_NC, bits)
    assert (codes_NC.dtype, scale_N1.dtype, zero_N1.dtype) == (np.uint8, np.float32, np.uint8)
    assert codes_NC.shape == x_NC.shape
    assert scale_N1.shape == zero_N1.shape == (*x_NC.shape[:-1], 1)
    heads = x_NC.reshape(-1, x_NC.shape[-1])
    for head, codes, scale, zero in zip(heads, codes_NC.reshape(heads.shape), scale_N1.flat, zero_N1.flat, strict=True):
        wanted_codes, wanted_scale, wanted_zero = by_the_book(head, bits)
        assert (codes.tolist(), scale, zero) == (wanted_codes, wanted_scale, wanted_zero)
    values = arithmetic.dequantize_kv(codes_NC, scale_N1, zero_N1)
    assert values.dtype == np.float32
    exact = (codes_NC.astype(np.float64) - zero_N1.astype(np.float64)) * scale_N1.astype(np.float64)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(values, exact.astype(np.float32))


@given(HEADS.filter(lambda x: np.abs(x).max() < 1e37), BITS)
def test_an_error_is_about_half_a_step(x_NC, bits):
    codes_NC, scale_N1, zero_N1 = arithmetic.quantize_kv(x_NC, bits)
    errors_NC = np.abs(arithmetic.dequantize_kv(codes_NC, scale_N1, zero_N1).astype(np.float64) - x_NC)
    # A step for both ends together: the zero point is rounded, and so is the scale, by up to 2**-8 of the range. What
    # lies beyond the last code for these two reasons is clipped.
    clipped = 0.5 + (2**bits - 1) * 2.0**-8
    assert (errors_NC <= (0.5 + clipped) * scale_N1 * (1 + 1e-5)).all()
    inside = (codes_NC > 0) & (codes_NC < 2**bits - 1)
    assert (errors_NC <= np.where(inside, 0.5 * scale_N1 * (1 + 1e-5), np.inf)).all()


@given(HEADS.filter(lambda x: np.abs(x).max() < 1e37), BITS)
def test_zero_is_exactly_zero(x_NC, bits):
    x_NC[..., 0] = 0
    assert not arithmetic.dequantize_kv(*arithmetic.quantize_kv(x_NC, bits))[..., 0].any()


def test_a_zero_head_has_scale_one_and_zero_point_zero():
    codes_NC, scale_N1, zero_N1 = arithmetic.quantize_kv(np.zeros((2, 3, 4), np.float32), 4)
    assert not codes_NC.any()
    assert not zero_N1.any()
    assert (scale_N1 == 1).all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_range_on_one_side_of_zero_uses_all_codes(bits, sign):
    levels = 2**bits - 1
    head = sign * np.arange(levels + 1, dtype=np.float32)
    codes_NC, scale_N1, zero_N1 = arithmetic.quantize_kv(head, bits)
    assert (scale_N1.item(), zero_N1.item()) == (1, 0 if sign > 0 else levels)
    np.testing.assert_array_equal(np.sort(codes_NC), np.arange(levels + 1))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_head_that_is_not_finite_is_nan_and_no_other(value, bits):
    x_NC = np.random.default_rng(0).normal(size=(3, 2, 8)).astype(np.float32)
    sound = arithmetic.dequantize_kv(*arithmetic.quantize_kv(x_NC, bits))
    x_NC[1, 0, 5] = value
    spoiled = arithmetic.dequantize_kv(*arithmetic.quantize_kv(x_NC, bits))
    assert np.isnan(spoiled[1, 0]).all()
    spoiled[1, 0] = sound[1, 0]
    np.testing.assert_array_equal(spoiled, sound)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, -1)])
def test_numbers_near_the_largest_do_not_overflow(signs, bits):
    head = np.array([*signs, 0, 0], np.float32) * np.float32(LARGEST * (1 - 2.0**-8))
    head[3] = 1
    values = arithmetic.dequantize_kv(*arithmetic.quantize_kv(head, bits))
    assert np.isfinite(values).all()
    np.testing.assert_allclose(values[:2], head[:2], rtol=0.1)
    np.testing.assert_array_equal(values[2:], 0)
