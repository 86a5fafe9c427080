"""The numeric specification against exact oracles: Python integers, fractions and float64."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quant import arithmetic

CODES = st.integers(-8, 7)
SHAPES = hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=9)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
POSITIVE = st.floats(2.0**-60, 2.0**60, width=32)


@given(hnp.arrays(np.int8, SHAPES, elements=CODES))
@example(np.array([-8], np.int8))
@example(np.array([[7, -8, -1]], np.int8))
def test_unpack_inverts_pack(codes):
    packed = arithmetic.pack(codes)
    assert packed.dtype == np.uint8
    assert packed.shape == (*codes.shape[:-1], (codes.shape[-1] + 1) // 2)
    np.testing.assert_array_equal(arithmetic.unpack(packed, codes.shape[-1]), codes)


def test_pack_puts_the_even_index_in_the_low_nibble():
    np.testing.assert_array_equal(arithmetic.pack(np.array([1, -1, -8], np.int8)), np.array([0xF1, 0x08], np.uint8))


def test_pack_refuses_what_is_no_code():
    with pytest.raises(ValueError, match=r"must lie in \[-8, 7\]"):
        arithmetic.pack(np.array([8], np.int8))


@pytest.mark.parametrize("length", [2, 5])
def test_unpack_refuses_a_width_that_does_not_fit(length):
    with pytest.raises(ValueError, match=f"do not hold {length} codes"):
        arithmetic.unpack(np.zeros((1, 2), np.uint8), length)


def test_unpack_refuses_dirty_padding():
    with pytest.raises(ValueError, match="padding"):
        arithmetic.unpack(np.array([0x10], np.uint8), 1)


def nearest_code(value: float, scale: float) -> int:
    """The specification in exact fractions, but for the quotient, which is a float32."""
    quotient = Fraction(float(np.float32(value) / np.float32(scale)))
    return max(-8, min(7, round(quotient)))  # round() of a Fraction goes half to even


@given(hnp.arrays(np.float32, SHAPES, elements=st.floats(-1e6, 1e6, width=32)), st.floats(2.0**-10, 2.0**10, width=32))
def test_quantize_rounds_to_nearest(values, scale):
    wanted = [nearest_code(value, scale) for value in values.ravel()]
    np.testing.assert_array_equal(arithmetic.quantize(values, np.float32(scale)).ravel(), wanted)


def test_quantize_rounds_half_to_even_and_saturates():
    values = np.array([-100, -8.5, -7.5, -2.5, -1.5, -0.5, -0.0, 0.0, 0.5, 1.5, 2.5, 7.5, 100], np.float32)
    wanted = [-8, -8, -8, -2, -2, 0, 0, 0, 0, 2, 2, 7, 7]
    np.testing.assert_array_equal(arithmetic.quantize(values, np.float32(1)), wanted)


def test_quantize_divides_rather_than_multiplying_by_the_reciprocal():
    # In float32, 3.5 steps of this scale divide to exactly 3.5, which rounds to 4; many reciprocals fall beside it.
    scales = np.arange(1, 2000, dtype=np.float32) / 977
    halves = np.float32(3.5) * scales
    exact = [nearest_code(value, scale) for value, scale in zip(halves, scales, strict=True)]
    by_reciprocal = np.rint(halves * (np.float32(1) / scales))
    np.testing.assert_array_equal(arithmetic.quantize(halves, scales), exact)
    assert (by_reciprocal != exact).any()


@given(FINITE.map(abs))
@example(0.0)
@example(1e-45)
@example(3.4028234663852886e38)
def test_a_scale_is_a_bfloat16_number(absmax):
    scale = arithmetic.tensor_scale(absmax)
    assert np.isfinite(scale)
    assert scale > 0
    assert np.float32(ml_dtypes.bfloat16(scale)) == scale
    if absmax >= 7 * 2.0**-126:
        assert abs(float(scale) * 7 / absmax - 1) <= 2.0**-8
    elif absmax == 0:
        assert scale == 1


@pytest.mark.parametrize("absmax", [np.nan, np.inf])
def test_a_bound_that_is_not_finite_is_refused_by_name(absmax):
    with pytest.raises(arithmetic.NonFiniteError, match=r"layers\.0"):
        arithmetic.tensor_scale(absmax, "layers.0")


def test_a_negative_bound_is_refused():
    with pytest.raises(ValueError, match="must not be negative"):
        arithmetic.tensor_scale(-1.0)


def test_require_finite_names_tensor_and_place():
    values = np.ones((2, 3), np.float32)
    values[1, 2] = np.inf
    with pytest.raises(arithmetic.NonFiniteError, match=r"w: 1 of 6 .* \(1, 2\)"):
        arithmetic.require_finite(values, "w")


@given(st.data(), st.integers(1, 5), st.integers(1, 40), st.integers(1, 5))
def test_integer_sums_are_those_of_python(data, rows, reduction, outputs):
    x_NK = data.draw(hnp.arrays(np.int8, (rows, reduction), elements=CODES))
    w_MK = data.draw(hnp.arrays(np.int8, (outputs, reduction), elements=CODES))
    wanted = [[sum(int(x) * int(w) for x, w in zip(xs, ws, strict=True)) for ws in w_MK] for xs in x_NK]
    np.testing.assert_array_equal(arithmetic.integer_matmul(x_NK, w_MK), wanted)


def test_integer_sums_are_exact_at_the_longest_reduction():
    codes = np.full((1, arithmetic.MAX_REDUCTION), -8, np.int8)
    assert arithmetic.integer_matmul(codes, codes).item() == 64 * arithmetic.MAX_REDUCTION
    longer = np.full((1, arithmetic.MAX_REDUCTION + 1), -8, np.int8)
    with pytest.raises(ValueError, match="not exact"):
        arithmetic.integer_matmul(longer, longer)


@given(hnp.arrays(np.float32, (3, 7), elements=st.floats(-100, 100, width=32)), POSITIVE, POSITIVE)
def test_quantized_linear_is_one_rounding_of_the_float64_product(x_NK, input_scale, weight_scale):
    codes_MK = np.arange(-8, 6, dtype=np.int8).reshape(2, 7)
    got = arithmetic.quantized_linear(x_NK, np.float32(input_scale), codes_MK, np.float32(weight_scale))
    sums = arithmetic.quantize(x_NK, np.float32(input_scale)).astype(np.float64) @ codes_MK.T.astype(np.float64)
    wanted = (sums * np.float64(np.float32(input_scale) * np.float32(weight_scale))).astype(np.float32)
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.filterwarnings("error")
def test_a_nan_spoils_its_own_row_and_no_other():
    random = np.random.default_rng(0)
    codes_MK, scale = random.integers(-8, 8, (5, 30)).astype(np.int8), np.float32(0.25)
    sound_NK = random.normal(size=(7, 30)).astype(np.float32)
    for value, like in ((np.nan, None), (np.inf, 7), (-np.inf, -8), (3e38, 7)):
        x_NK = sound_NK.copy()
        x_NK[3, 11] = value
        y_NM = arithmetic.quantized_linear(x_NK, scale, codes_MK, np.float32(2.0**-5))
        codes_NK = arithmetic.quantize(sound_NK, scale).astype(np.int64)
        codes_NK[3, 11] = like or 0
        wanted_NM = (codes_NK @ codes_MK.astype(np.int64).T * 2.0**-7).astype(np.float32)
        if like is None:
            wanted_NM[3] = np.nan
        np.testing.assert_array_equal(y_NM, wanted_NM)
        assert y_NM.dtype == np.float32


@pytest.mark.filterwarnings("error")
def test_a_quotient_beyond_float32_saturates():
    np.testing.assert_array_equal(arithmetic.quantize(np.array([3e38, -3e38]), np.float32(2.0**-126)), [7, -8])
