"""Every kernel of this machine against the numeric specification, bit for bit, and against numpy in float64."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from quant import arithmetic
from quant.hadamard import Hadamard, base_matrix
from runtime.engine.native_library import NativeLibraryError, load_library

Floats = NDArray[np.float32]

try:
    LIBRARY: Any = load_library()
    KERNELS = LIBRARY.available_kernels()
except NativeLibraryError as error:
    pytest.skip(str(error), allow_module_level=True)

SEEDS = st.integers(0, 2**32 - 1)
BITS = st.sampled_from([4, 8])
WIDTHS = st.integers(1, 70)
EXTREMES = np.array([np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45, -1e-40, -0.0, 2.0**-126], np.float32)


@pytest.fixture(scope="module", params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Any:
    """Each of them in turn."""
    return LIBRARY.Kernel(request.param)


def numbers(random: np.random.Generator, *shape: int, extremes: float = 0.0) -> Floats:
    """Normal numbers of widely different scales from row to row, a share of them replaced by extremes."""
    x = random.normal(size=shape) * 10.0 ** random.integers(-6, 7, size=(*shape[:-1], 1))
    x = np.where(random.random(shape) < extremes, random.choice(EXTREMES, shape), x.astype(np.float32))
    return x.astype(np.float32)


def stored(codes_MK: NDArray[np.int8], bits: int) -> NDArray[Any]:
    return arithmetic.pack(codes_MK) if bits == 4 else codes_MK


def codes(random: np.random.Generator, rows: int, columns: int, bits: int) -> NDArray[np.int8]:
    lowest, highest = arithmetic.code_range(bits)
    return random.integers(lowest, highest + 1, size=(rows, columns)).astype(np.int8)


def weight_scale(random: np.random.Generator, rows: int, per_output: bool) -> Floats:
    return (random.random(rows if per_output else 1) + 0.01).astype(np.float32)


@given(SEEDS, st.integers(0, 33), st.integers(1, 50), WIDTHS, BITS, BITS, st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_quantized_linear_has_the_bits_of_the_specification(
    kernel, seed, rows, outputs, columns, bits, input_bits, static, per_output
):
    random = np.random.default_rng(seed)
    x_NK = numbers(random, rows, columns, extremes=0.01)
    codes_MK, scale = codes(random, outputs, columns, bits), weight_scale(random, outputs, per_output)
    input_scale = np.float32(random.random() + 0.01) if static else None
    y_NM = kernel.quantized_linear(x_NK, input_scale, input_bits, stored(codes_MK, bits), columns, bits, scale)
    with np.errstate(over="ignore", invalid="ignore"):
        expected_NM = arithmetic.quantized_linear(x_NK, input_scale, codes_MK, scale, input_bits, bits)
    np.testing.assert_array_equal(y_NM, expected_NM)


@pytest.mark.parametrize("columns", [640, 5504])
def test_quantized_linear_of_the_widths_of_models(kernel, columns):
    random = np.random.default_rng(columns)
    x_NK, codes_MK = numbers(random, 27, columns), codes(random, 49, columns, 4)
    scale = np.float32([0.02])
    y_NM = kernel.quantized_linear(x_NK, None, 4, arithmetic.pack(codes_MK), columns, 4, scale)
    np.testing.assert_array_equal(y_NM, arithmetic.quantized_linear(x_NK, None, codes_MK, scale))


@given(SEEDS, st.integers(1, 20), st.integers(1, 130), BITS, st.booleans())
@settings(max_examples=40, deadline=None)
def test_quantize_has_the_codes_of_the_specification(kernel, seed, rows, width, bits, static):
    x_NF = numbers(np.random.default_rng(seed), rows, width, extremes=0.01)
    scale = np.float32(0.37) if static else None
    codes_NF, sums_N, scales_N = kernel.quantize(x_NF, scale, bits)
    expected_N1 = np.full((rows, 1), scale, np.float32) if static else arithmetic.token_scales(x_NF, bits)
    lost_N1 = np.isnan(x_NF).any(axis=-1, keepdims=True) | np.isnan(expected_N1)
    np.testing.assert_array_equal(scales_N[:, None], np.where(lost_N1, np.float32(np.nan), expected_N1))
    kept_N = ~lost_N1[:, 0]
    np.testing.assert_array_equal(codes_NF[kept_N], arithmetic.quantize(x_NF[kept_N], expected_N1[kept_N], bits))
    np.testing.assert_array_equal(sums_N[kept_N], codes_NF[kept_N].sum(axis=-1, dtype=np.int32))


@given(SEEDS, st.integers(1, 64), BITS)
@settings(max_examples=40, deadline=None)
def test_quantize_kv_has_the_bits_of_the_specification(kernel, seed, half, bits):
    x_NC = numbers(np.random.default_rng(seed), 40, 2 * half, extremes=0.005)
    with np.errstate(over="ignore", invalid="ignore"):
        codes_NC, scale_N1, zero_N1 = arithmetic.quantize_kv(x_NC, bits)
    found_NC, found_scale_N, found_zero_N = kernel.quantize_kv(x_NC, bits)
    np.testing.assert_array_equal(found_scale_N, scale_N1[:, 0])
    np.testing.assert_array_equal(found_zero_N, zero_N1[:, 0])
    kept_N = ~np.isnan(found_scale_N)
    np.testing.assert_array_equal(found_NC[kept_N], codes_NC[kept_N])


def test_ties_are_rounded_as_quotients_not_as_products_with_a_reciprocal(kernel):
    # x = (n + 1/2) * scale, and its neighbours: where the reciprocal's own rounding would show.
    scale = np.float32(0.0478515625)
    middles_K = (np.arange(-8, 8, dtype=np.float32) + np.float32(0.5)) * scale
    x_NK = np.stack([middles_K, np.nextafter(middles_K, np.float32(9)), np.nextafter(middles_K, np.float32(-9))])
    np.testing.assert_array_equal(kernel.quantize(x_NK, scale, 8)[0], arithmetic.quantize(x_NK, scale, 8))
    x_NC = np.random.default_rng(0).normal(size=(4000, 64)).astype(np.float32)
    np.testing.assert_array_equal(kernel.quantize_kv(x_NC, 8)[0], arithmetic.quantize_kv(x_NC, 8)[0])


@pytest.mark.parametrize("width", [2, 6, 12, 16, 40, 96, 160, 172 * 4, 1376])
def test_hadamard_has_the_bits_of_the_specification(kernel, width):
    transform = Hadamard.of_width(width)
    x_NF = np.random.default_rng(width).normal(size=(3, width)).astype(np.float32)
    y_NF = kernel.hadamard(x_NF, transform.blocks, transform.base, transform.power, base_matrix(transform.base))
    np.testing.assert_array_equal(y_NF, transform.apply(x_NF))


@given(SEEDS, st.integers(0, 20), st.integers(1, 40), WIDTHS, st.sampled_from(["float32", "bfloat16"]))
@settings(max_examples=40, deadline=None)
def test_linear_against_float64(kernel, seed, rows, outputs, columns, dtype):
    random = np.random.default_rng(seed)
    x_NK = random.normal(size=(rows, columns)).astype(np.float32)
    weight_MK = random.normal(size=(outputs, columns)).astype(np.float32)
    if dtype == "bfloat16":
        halves_MK = weight_MK.astype(ml_dtypes.bfloat16)
        y_NM, weight_MK = kernel.linear(x_NK, halves_MK.view(np.uint16)), halves_MK.astype(np.float32)
    else:
        y_NM = kernel.linear(x_NK, weight_MK)
    close_to_product(y_NM, x_NK, weight_MK)


@given(SEEDS, st.integers(0, 20), st.integers(1, 40), WIDTHS, BITS, st.booleans())
@settings(max_examples=40, deadline=None)
def test_linear_of_codes_against_float64(kernel, seed, rows, outputs, columns, bits, per_output):
    random = np.random.default_rng(seed)
    x_NK = random.normal(size=(rows, columns)).astype(np.float32)
    codes_MK, scale = codes(random, outputs, columns, bits), weight_scale(random, outputs, per_output)
    y_NM = kernel.coded_linear(x_NK, stored(codes_MK, bits), columns, bits, scale)
    close_to_product(y_NM, x_NK, codes_MK * scale.astype(np.float64)[:, None])


def close_to_product(y_NM: Floats, x_NK: Floats, weight_MK: NDArray[Any]) -> None:
    x_NK, weight_MK = x_NK.astype(np.float64), weight_MK.astype(np.float64)
    bound_NM = 1e-6 * (np.abs(x_NK) @ np.abs(weight_MK).T) + 1e-30
    assert (np.abs(y_NM - x_NK @ weight_MK.T) <= bound_NM).all()


@given(SEEDS, st.integers(1, 8), st.integers(1, 200))
@settings(max_examples=30, deadline=None)
def test_norms_and_activations_against_float64(kernel, seed, rows, width):
    random = np.random.default_rng(seed)
    x_NF, up_NF = numbers(random, rows, width), random.normal(size=(rows, width)).astype(np.float32)
    wide_NF, weight_F = x_NF.astype(np.float64), up_NF[0]
    rms_N1 = np.sqrt(np.mean(np.square(wide_NF), axis=-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(
        kernel.rms_norm(x_NF, weight_F, 1e-5), wide_NF / rms_N1 * weight_F, rtol=2e-6, atol=1e-40
    )
    gate_NF = np.clip(x_NF, -80, 80)
    silu_NF = gate_NF.astype(np.float64) / (1 + np.exp(-gate_NF.astype(np.float64)))
    np.testing.assert_allclose(kernel.swiglu(gate_NF, up_NF), silu_NF * up_NF, rtol=1e-6, atol=1e-36)


@given(SEEDS, st.integers(1, 70))
@settings(max_examples=30, deadline=None)
def test_rotate_has_the_bits_of_numpy(kernel, seed, half):
    x_NC, tables = numbers(np.random.default_rng(seed), 3, 2 * half), np.random.default_rng(seed).random((2, 3, half))
    cosine, sine = tables.astype(np.float32)
    first, second = x_NC[:, :half], x_NC[:, half:]
    expected_NC = np.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    np.testing.assert_array_equal(kernel.rotate(x_NC, cosine, sine), expected_NC)


@given(st.lists(st.sampled_from([-np.inf, -1.5, 0.0, -0.0, 2.0, 3.0, np.inf, np.nan]), min_size=1, max_size=80))
@settings(deadline=None)
def test_argmax_is_the_first_largest(kernel, values):
    largest = max(values) if not any(map(math.isnan, values)) else math.nan
    expected = values.index(largest) if math.isfinite(largest) else -1
    assert kernel.argmax(np.array(values, np.float32)) == expected


@given(
    SEEDS, st.integers(1, 12), st.integers(0, 60), st.integers(1, 8), st.integers(1, 40), st.sampled_from([16, 8, 4])
)
@settings(max_examples=40, deadline=None)
def test_attend_against_float64(kernel, seed, tokens, before, heads, half, bits):
    random = np.random.default_rng(seed)
    channels, positions = 2 * half, before + tokens
    queries_LHC = random.normal(size=(tokens, heads, channels)).astype(np.float32)
    keys_PC, values_PC = random.normal(size=(2, positions, channels)).astype(np.float32)
    table = random.permutation(-(-positions // 16)).astype(np.int32)
    out_LHC = kernel.attend(queries_LHC, keys_PC, values_PC, bits, table)
    cached_keys_PC, cached_values_PC = cached(keys_PC, bits), cached(values_PC, bits)
    for i in range(tokens):
        seen = before + i + 1
        scores_HP = queries_LHC[i] @ cached_keys_PC[:seen].T / math.sqrt(channels)
        weights_HP = np.exp(scores_HP - scores_HP.max(axis=-1, keepdims=True))
        weights_HP /= weights_HP.sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(out_LHC[i], weights_HP @ cached_values_PC[:seen], rtol=1e-4, atol=1e-5)


def cached(x_PC: Floats, bits: int) -> NDArray[np.float64]:
    if bits == 16:
        return arithmetic.round_to_bfloat16(x_PC).astype(np.float64)
    return arithmetic.dequantize_kv(*arithmetic.quantize_kv(x_PC, bits)).astype(np.float64)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_kernels_with_fused_multiply_add_agree_bit_for_bit(bits):
    fused = [LIBRARY.Kernel(name) for name in KERNELS if name != "portable"]
    if len(fused) < 2:
        pytest.skip("this processor runs one such kernel only")
    random = np.random.default_rng(bits)
    queries, keys_PC, values_PC = numbers(random, 5, 3, 80) / 1e6, numbers(random, 40, 80), numbers(random, 40, 80)
    x_NK, weight_MK = numbers(random, 19, 77), numbers(random, 33, 77)
    table = np.array([2, 0, 1], np.int32)
    results = [
        [
            kernel.attend(queries, keys_PC, values_PC, bits, table),
            kernel.linear(x_NK, weight_MK),
            kernel.swiglu(x_NK, x_NK),
        ]
        for kernel in fused
    ]
    for result in results[1:]:
        for found, expected in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(found, expected)


def test_what_does_not_fit_is_refused():
    kernel, x_NK = LIBRARY.Kernel(), np.zeros((2, 8), np.float32)
    scale, packed = np.ones(1, np.float32), np.zeros((3, 4), np.uint8)
    with pytest.raises(ValueError, match="no kernel"):
        LIBRARY.Kernel("abacus")
    with pytest.raises(ValueError, match="other columns"):
        kernel.quantized_linear(x_NK, None, 4, packed, 7, 4, scale)
    with pytest.raises(ValueError, match="not of so many columns"):
        kernel.quantized_linear(x_NK, None, 4, packed, 8, 8, scale)
    with pytest.raises(ValueError, match="2 scales"):
        kernel.quantized_linear(x_NK, None, 4, packed, 8, 4, np.ones(2, np.float32))
    with pytest.raises(ValueError, match="table"):
        kernel.attend(x_NK[:, None], x_NK, x_NK, 8, np.array([1], np.int32))
    with pytest.raises(ValueError, match="even number of channels"):
        kernel.quantize_kv(np.zeros((1, 3), np.float32), 8)


def test_limits_are_positive():
    assert LIBRARY.read_GBps(2**24, 2, 0.02) > 0.1
    assert LIBRARY.dot_GOPS(1, 0.02) > 0.1
    with pytest.raises(ValueError, match="no thread"):
        LIBRARY.dot_GOPS(0, 0.1)
