"""Single layers of the native engine, as other engines call them, against `quant.arithmetic` and 64-bit integers."""

from __future__ import annotations

import ctypes
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

try:
    LIBRARY: Any = load_library()
except NativeLibraryError as error:
    pytest.skip(str(error), allow_module_level=True)

TEAM = LIBRARY.Team(1)
BITS = st.sampled_from([4, 8])
INPUT_SCALE = np.float32(0.34375)


def codes(random: np.random.Generator, rows: int, columns: int, bits: int) -> NDArray[np.int8]:
    lowest, highest = arithmetic.code_range(bits)
    return random.integers(lowest, highest + 1, (rows, columns)).astype(np.int8)


def layer(codes_MK: NDArray[np.int8], bits: int, scale: Any, team: Any = TEAM, **inputs: Any) -> Any:
    stored = arithmetic.pack(codes_MK) if bits == 4 else codes_MK
    return LIBRARY.PackedLinear(team, stored, codes_MK.shape[1], bits, scale, **inputs)


def outputs(linear: Any, x_NK: NDArray[Any], count: int) -> NDArray[np.float32]:
    y_NM = np.full((len(x_NK), count), 77, np.float32)
    linear.forward(x_NK, y_NM)
    return y_NM


@pytest.mark.parametrize("name", LIBRARY.available_kernels())
@given(st.integers(0, 2**32 - 1), st.integers(0, 40), st.integers(1, 70), st.integers(1, 90), BITS, BITS, st.booleans())
@settings(max_examples=30, deadline=None)
def test_forward_is_the_specification_bit_for_bit(name, seed, rows, count, columns, bits, input_bits, static):
    random = np.random.default_rng(seed)
    x_NK = random.normal(size=(rows, columns)).astype(np.float32) * 3
    x_NK[random.random((rows, columns)) < 0.01] = random.choice([np.nan, np.inf, -np.inf, 0])
    codes_MK = codes(random, count, columns, bits)
    scale_M = (random.random(count) + 0.01).astype(np.float32)
    input_scale = INPUT_SCALE if static else None
    linear = layer(codes_MK, bits, scale_M, input_bits=input_bits, input_scale=input_scale, kernel=name)
    with np.errstate(over="ignore", invalid="ignore"):
        expected_NM = arithmetic.quantized_linear(x_NK, input_scale, codes_MK, scale_M, input_bits, bits)
    np.testing.assert_array_equal(outputs(linear, x_NK, count), expected_NM)


@pytest.mark.parametrize("width", [12, 172, 640, 1536])
def test_inputs_pass_the_transform_first(width: int) -> None:
    random = np.random.default_rng(width)
    x_NK, codes_MK = random.normal(size=(9, width)).astype(np.float32), codes(random, 20, width, 4)
    transform = Hadamard.of_width(width)
    signs = base_matrix(transform.base)
    rotation: dict[str, Any] = {"blocks": transform.blocks, "power": transform.power, "signs": signs}
    linear = layer(codes_MK, 4, np.float32([0.5]), input_bits=4, **rotation)
    expected_NM = arithmetic.quantized_linear(transform.apply(x_NK), None, codes_MK, np.float32(0.5))
    np.testing.assert_array_equal(outputs(linear, x_NK, 20), expected_NM)


@pytest.mark.parametrize("rows", [1, 23, 600])
@pytest.mark.parametrize("bits", [4, 8])
def test_multiply_scales_exact_sums_once(bits: int, rows: int) -> None:
    random = np.random.default_rng(rows)
    x_NK, codes_MK = codes(random, rows, 577, bits), codes(random, 50, 577, bits)
    x_NK[0], codes_MK[0] = -(2 ** (bits - 1)), -(2 ** (bits - 1))  # the largest sum there is
    scales_N, scale_M = random.random(rows).astype(np.float32), random.random(50).astype(np.float32)
    scales_N[-1] = np.nan
    y_NM = np.empty((rows, 50), np.float32)
    layer(codes_MK, bits, scale_M, input_bits=bits).multiply(x_NK, scales_N, y_NM)
    sums_NM = x_NK.astype(np.int64) @ codes_MK.astype(np.int64).T
    np.testing.assert_array_equal(y_NM, sums_NM.astype(np.float32) * (scales_N[:, None] * scale_M))


def test_inputs_of_16_bits_are_summed_as_floats() -> None:
    random = np.random.default_rng(3)
    x_NK, codes_MK = random.normal(size=(30, 133)).astype(np.float32), codes(random, 40, 133, 4)
    y_NM = outputs(layer(codes_MK, 4, np.float32([0.25]), input_bits=16), x_NK, 40)
    expected_NM = x_NK.astype(np.float64) @ codes_MK.astype(np.float64).T * 0.25
    bound_NM = np.abs(x_NK).astype(np.float64) @ np.abs(codes_MK).astype(np.float64).T
    assert (np.abs(y_NM - expected_NM) <= 133 * 2.0**-24 * bound_NM).all()


def test_bfloat16_in_and_out_is_the_float32_result_rounded_once() -> None:
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(4)
    codes_MK = codes(random, 40, 96, 4)
    x = torch.from_numpy(random.normal(size=(300, 96)).astype(np.float32)).bfloat16()
    x[7, 3] = float("nan")
    y = torch.empty((300, 40), dtype=torch.bfloat16)
    layer(codes_MK, 4, np.float32([0.37]), input_bits=4, input_scale=INPUT_SCALE).forward(x, y)
    with np.errstate(invalid="ignore"):
        expected_NM = arithmetic.quantized_linear(x.float().numpy(), INPUT_SCALE, codes_MK, np.float32(0.37))
    np.testing.assert_array_equal(y.float().numpy(), expected_NM.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_the_threads_of_torch_compute_the_same() -> None:
    torch = pytest.importorskip("torch")
    openmp = ctypes.CDLL(f"{torch.__path__[0]}/lib/libtorch_cpu.so").GOMP_parallel
    team = LIBRARY.Team(3, ctypes.cast(openmp, ctypes.c_void_p).value)
    random = np.random.default_rng(5)
    codes_MK = codes(random, 333, 200, 4)
    alone, together = (layer(codes_MK, 4, np.float32([0.5]), t, input_bits=4) for t in (TEAM, team))
    for rows in (1, 2, 40, 700):
        x_NK = random.normal(size=(rows, 200)).astype(np.float32)
        np.testing.assert_array_equal(outputs(together, x_NK, 333), outputs(alone, x_NK, 333))


def test_what_does_not_fit_is_refused() -> None:
    codes_MK, scale = np.zeros((3, 8), np.int8), np.float32([1])
    with pytest.raises(ValueError, match="several threads needs OpenMP"):
        LIBRARY.Team(2)
    with pytest.raises(ValueError, match="4, 8 or 16 bits"):
        layer(codes_MK, 8, scale, input_bits=5)
    with pytest.raises(ValueError, match="a positive number"):
        layer(codes_MK, 8, scale, input_bits=4, input_scale=float("nan"))
    with pytest.raises(ValueError, match="4 channels for 8 inputs"):
        layer(codes_MK, 8, scale, input_bits=4, power=4, signs=base_matrix(1))
    linear = layer(codes_MK, 8, scale, input_bits=16)
    with pytest.raises(ValueError, match="other columns"):
        linear.forward(np.zeros((2, 7), np.float32), np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match="outputs of the layer"):
        linear.forward(np.zeros((2, 8), np.float32), np.zeros((1, 3), np.float32))
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        linear.forward(np.zeros((2, 8)), np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match="no codes"):
        linear.multiply(np.zeros((2, 8), np.int8), np.zeros(2, np.float32), np.zeros((2, 3), np.float32))
