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
BITS = st.sampled_from([4, 8])
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


def nearest_code(value, scale, bits=4):
    """The specification in exact fractions, but for the quotient, which is a float32."""
    with np.errstate(over="ignore"):
        quotient = np.float32(value) / np.float32(scale)
    if np.isinf(quotient):
        return 2 ** (bits - 1) - 1 if quotient > 0 else -(2 ** (bits - 1))
    whole = round(Fraction(float(quotient)))  # round() of a Fraction goes half to even
    return max(-(2 ** (bits - 1)), min(2 ** (bits - 1) - 1, whole))


@given(hnp.arrays(np.float32, SHAPES, elements=FINITE), POSITIVE, BITS)
@example(np.array([1e-45, -1e-45, 2.0**-126], np.float32), 2.0**-126, 4)  # denormals
@example(np.array([3.4e38, -3.4e38], np.float32), 2.0**-60, 8)
def test_quantize_rounds_to_nearest(values, scale, bits):
    codes = arithmetic.quantize(values, np.float32(scale), bits)
    assert codes.dtype == np.int8
    wanted = [nearest_code(value, scale, bits) for value in values.ravel()]
    np.testing.assert_array_equal(codes.ravel(), wanted)


@given(hnp.array_shapes(), BITS, st.one_of(st.just(0.0), FINITE.filter(bool)))
@example((3, 5), 4, 1e-45)
@example((2, 2), 8, -3.4028234663852886e38)
def test_a_constant_tensor_comes_back_within_half_a_step(shape, bits, constant):
    """Zero, a denormal, the largest number: the scale of its absmax serves them all."""
    values = np.full(shape, constant, np.float32)
    scale = arithmetic.tensor_scale(float(np.abs(values).max()), bits=bits)
    codes = arithmetic.quantize(values, scale, bits)
    # A scale that was rounded down to bfloat16 by 2**-8 puts the absmax up to so much beyond the highest code.
    highest = 2 ** (bits - 1) - 1
    beyond = highest * 2.0**-8
    errors = np.abs(codes * np.float64(scale) - values.astype(np.float64))
    assert errors.max() <= max(0.5, beyond) * float(scale) * (1 + 1e-6)


@given(hnp.arrays(np.float32, SHAPES, elements=st.floats(-1, 1, width=32)), BITS)
def test_one_huge_value_takes_the_highest_code_and_the_others_none(values, bits):
    values.ravel()[0] = 1e30
    codes = arithmetic.quantize(values, arithmetic.tensor_scale(1e30, bits=bits), bits).ravel()
    assert codes[0] == 2 ** (bits - 1) - 1
    assert not codes[1:].any()


@pytest.mark.parametrize("bits", [0, 2, 3, 5, 16])
def test_other_bits_are_refused(bits):
    for use in (
        lambda: arithmetic.code_range(bits),
        lambda: arithmetic.quantize(np.zeros(3, np.float32), np.float32(1), bits),
        lambda: arithmetic.tensor_scale(1.0, bits=bits),
        lambda: arithmetic.token_scales(np.zeros((1, 3), np.float32), bits),
        lambda: arithmetic.quantize_kv(np.zeros((1, 3), np.float32), bits),
    ):
        with pytest.raises(ValueError, match=f"4 or 8 bits, not {bits}"):
            use()


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


@given(FINITE.map(abs), BITS)
@example(0.0, 4)
@example(1e-45, 8)
@example(3.4028234663852886e38, 4)
def test_a_scale_is_a_bfloat16_number(absmax, bits):
    scale, highest = arithmetic.tensor_scale(absmax, bits=bits), 2 ** (bits - 1) - 1
    assert np.isfinite(scale)
    assert scale > 0
    assert np.float32(ml_dtypes.bfloat16(scale)) == scale
    if absmax >= highest * 2.0**-126:
        assert abs(float(scale) * highest / absmax - 1) <= 2.0**-8
    elif absmax == 0:
        assert scale == 1


@given(hnp.arrays(np.float32, (3, 5), elements=FINITE), BITS)
@example(np.zeros((1, 4), np.float32), 4)
@example(np.full((1, 1), 1e-45, np.float32), 4)
@example(np.full((2, 3), 3.4028234663852886e38, np.float32), 8)
def test_a_token_has_the_scale_of_its_absmax(x_NK, bits):
    scales_N1 = arithmetic.token_scales(x_NK, bits)
    assert scales_N1.dtype == np.float32
    for row, scale in zip(x_NK, scales_N1[:, 0], strict=True):
        absmax = np.abs(row).max()
        quotient = np.float32(absmax) / np.float32(2 ** (bits - 1) - 1)
        assert scale == (1 if absmax == 0 else max(quotient, np.float32(2.0**-126)))
    # Nothing saturates but by the last rounding: the highest magnitude has the highest code.
    assert np.abs(x_NK / scales_N1).max() <= 2 ** (bits - 1) - 1 + 1e-4


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_token_that_is_not_finite_has_no_scale(value):
    x_NK = np.ones((3, 4), np.float32)
    x_NK[1, 2] = value
    np.testing.assert_array_equal(np.isnan(arithmetic.token_scales(x_NK)), [[False], [True], [False]])


def test_rows_without_channels_have_scale_one():
    np.testing.assert_array_equal(arithmetic.token_scales(np.empty((2, 0), np.float32)), np.ones((2, 1)))


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


BIT_PAIRS = [(4, 4), (8, 4), (8, 8)]
"""Of inputs and weights."""


@pytest.mark.parametrize(("input_bits", "weight_bits"), BIT_PAIRS)
@given(st.data(), st.integers(1, 5), st.integers(1, 40), st.integers(1, 5))
def test_integer_sums_are_those_of_python(input_bits, weight_bits, data, rows, reduction, outputs):
    inputs, weights = (st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in (input_bits, weight_bits))
    x_NK = data.draw(hnp.arrays(np.int8, (rows, reduction), elements=inputs))
    w_MK = data.draw(hnp.arrays(np.int8, (outputs, reduction), elements=weights))
    wanted = [[sum(int(x) * int(w) for x, w in zip(xs, ws, strict=True)) for ws in w_MK] for xs in x_NK]
    got = arithmetic.integer_matmul(x_NK, w_MK, input_bits, weight_bits)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(("input_bits", "weight_bits"), BIT_PAIRS)
def test_integer_sums_are_exact_at_the_longest_reduction(input_bits, weight_bits):
    width = arithmetic.MAX_REDUCTION
    x_NK = np.full((1, width), -(2 ** (input_bits - 1)), np.int8)
    w_MK = np.full((2, width), -(2 ** (weight_bits - 1)), np.int8)
    w_MK[1, 7] += 1  # one step away from a sum that float32 holds
    largest = width * 2 ** (input_bits + weight_bits - 2)
    wanted = [[largest, largest - 2 ** (input_bits - 1)]]
    np.testing.assert_array_equal(arithmetic.integer_matmul(x_NK, w_MK, input_bits, weight_bits), wanted)
    dtype = arithmetic.sum_dtype(width, input_bits, weight_bits)
    widened = arithmetic.integer_matmul(x_NK, w_MK.astype(dtype), input_bits, weight_bits)
    np.testing.assert_array_equal(widened, wanted)
    longer = np.ones((1, width + 1), np.int8)
    with pytest.raises(ValueError, match=f"a reduction of {width + 1} exceeds {width}"):
        arithmetic.integer_matmul(longer, longer, input_bits, weight_bits)


@pytest.mark.parametrize(("input_bits", "weight_bits"), BIT_PAIRS)
def test_sums_beyond_float32_are_made_in_float64(input_bits, weight_bits):
    longest = 2**24 // 2 ** (input_bits + weight_bits - 2)  # |sum| <= 2**24 up to here
    narrow = min(longest, arithmetic.MAX_REDUCTION)
    assert arithmetic.sum_dtype(narrow, input_bits, weight_bits) == np.float32
    if longest < arithmetic.MAX_REDUCTION:
        assert arithmetic.sum_dtype(longest + 1, input_bits, weight_bits) == np.float64
        # An odd sum above 2**24, which float32 would round.
        x_NK = np.full((1, longest + 1), -(2 ** (input_bits - 1)), np.int8)
        w_MK = np.full((1, longest + 1), -(2 ** (weight_bits - 1)), np.int8)
        x_NK[0, 0], w_MK[0, 0] = -1, -1
        wanted = longest * 2 ** (input_bits + weight_bits - 2) + 1
        assert arithmetic.integer_matmul(x_NK, w_MK, input_bits, weight_bits).item() == wanted
        assert int(np.float32(wanted)) != wanted


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize(("input_bits", "weight_bits"), BIT_PAIRS)
@given(hnp.arrays(np.float32, (3, 7), elements=st.floats(-100, 100, width=32)), POSITIVE, POSITIVE)
def test_quantized_linear_is_one_rounding_of_the_float64_product(
    input_bits, weight_bits, static, per_channel, x_NK, input_scale, weight_scale
):
    lowest, highest = -(2 ** (weight_bits - 1)), 2 ** (weight_bits - 1) - 1
    w_MK = np.linspace(lowest, highest, 14).astype(np.int8).reshape(2, 7)
    w_scale = np.array([weight_scale, weight_scale / 3], np.float32) if per_channel else np.float32(weight_scale)
    known = np.float32(input_scale) if static else None
    got = arithmetic.quantized_linear(x_NK, known, w_MK, w_scale, input_bits, weight_bits)

    scales_N1 = np.full((3, 1), input_scale, np.float32) if static else arithmetic.token_scales(x_NK, input_bits)
    codes = [
        [nearest_code(x, scale, input_bits) for x in row] for row, scale in zip(x_NK, scales_N1[:, 0], strict=True)
    ]
    sums = np.array(codes, np.float64) @ w_MK.T.astype(np.float64)
    wanted = (sums * (scales_N1 * w_scale).astype(np.float64)).astype(np.float32)
    assert got.dtype == np.float32
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
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_dynamic_scale_is_lost_with_its_row_and_no_other(value):
    random = np.random.default_rng(0)
    w_MK, x_NK = random.integers(-8, 8, (5, 30)).astype(np.int8), random.normal(size=(4, 30)).astype(np.float32)
    sound_NM = arithmetic.quantized_linear(x_NK, None, w_MK, np.float32(0.5), 8)
    x_NK[2, 3] = value
    y_NM = arithmetic.quantized_linear(x_NK, None, w_MK, np.float32(0.5), 8)
    assert np.isnan(y_NM[2]).all()
    np.testing.assert_array_equal(y_NM[[0, 1, 3]], sound_NM[[0, 1, 3]])


@pytest.mark.filterwarnings("error")
def test_a_quotient_beyond_float32_saturates():
    np.testing.assert_array_equal(arithmetic.quantize(np.array([3e38, -3e38]), np.float32(2.0**-126)), [7, -8])
