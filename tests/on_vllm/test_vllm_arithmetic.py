"""The plugin's arithmetic and kernels in torch, against `quant.arithmetic` and numpy: bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from quant import arithmetic
from quant.hadamard import Hadamard

torch = pytest.importorskip("torch")

from runtime.engine.vllm_arithmetic import integer_sums, quantize_rows, rotate_rows, token_scales, unpack  # noqa: E402
from runtime.engine.vllm_kernels import FusedWeight, choose_kernel  # noqa: E402

RNG = np.random.default_rng(7)


def codes(rows: int, columns: int, bits: int) -> np.ndarray:
    lowest, highest = arithmetic.code_range(bits)
    return RNG.integers(lowest, highest + 1, (rows, columns)).astype(np.int8)


@pytest.mark.parametrize("length", [1, 2, 7, 64])
def test_unpacks_what_the_quantizer_packs(length: int) -> None:
    stored = codes(5, length, 4)
    np.testing.assert_array_equal(unpack(torch.from_numpy(arithmetic.pack(stored)), length).numpy(), stored)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 3, 33])
def test_sums_are_exact(rows: int, bits: int) -> None:
    x_NK, w_MK = codes(rows, 640, bits), codes(48, 640, bits)
    x_NK[0], w_MK[0] = arithmetic.code_range(bits)[0], arithmetic.code_range(bits)[0]  # the largest sum there is
    exact_NM = x_NK.astype(np.int64) @ w_MK.astype(np.int64).T
    sums_NM = integer_sums(torch.from_numpy(x_NK), torch.from_numpy(w_MK))
    np.testing.assert_array_equal(sums_NM.numpy(), exact_NM)


@pytest.mark.parametrize("input_bits", [4, 8])
@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize("static", [True, False])
def test_a_layer_is_the_specification_bit_for_bit(static: bool, weight_bits: int, input_bits: int) -> None:
    """Fused parts with a scale each, ties of rounding, saturation, a zero row, a NaN, infinities."""
    columns = 96
    x_NK = (RNG.standard_normal((40, columns)) * 2).astype(np.float32)
    scale = np.float32(0.25)
    x_NK[:8] = np.round(x_NK[:8] * 8) / 8  # halves of the static scale
    x_NK[8], x_NK[9, 3], x_NK[10, 5] = 0, np.nan, np.inf
    w_MK = codes(24, columns, weight_bits)
    scale_M = arithmetic.round_to_bfloat16(np.repeat(np.float32([0.03, 0.5, 0.0007]), 8))
    stored = arithmetic.pack(w_MK) if weight_bits == 4 else w_MK
    weight = FusedWeight(torch.from_numpy(stored), columns, weight_bits, torch.from_numpy(scale_M))
    x = torch.from_numpy(x_NK)
    row_scale = torch.tensor([scale]) if static else token_scales(x.abs().amax(dim=-1, keepdim=True), bits=input_bits)
    codes_NK, scales_N1 = quantize_rows(x, row_scale, input_bits)
    y_NM = choose_kernel(weight, input_bits)(codes_NK, scales_N1, torch.float32)
    with np.errstate(invalid="ignore"):
        expected_NM = arithmetic.quantized_linear(
            x_NK, scale if static else None, w_MK, scale_M, input_bits, weight_bits
        )
    np.testing.assert_array_equal(y_NM.numpy(), expected_NM)


def test_inputs_of_bfloat16_are_quantized_as_the_numbers_they_are() -> None:
    x = torch.from_numpy(RNG.standard_normal((16, 64)).astype(np.float32)).bfloat16()
    codes_NK, _ = quantize_rows(x, torch.tensor([0.3125]), 4)
    np.testing.assert_array_equal(codes_NK.numpy(), arithmetic.quantize(x.float().numpy(), np.float32(0.3125)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_alone_in_4_bits(dtype: torch.dtype) -> None:
    w_MK = codes(24, 128, 4)
    scale_M = arithmetic.round_to_bfloat16(np.repeat(np.float32([0.03, 0.5]), 12))
    weight = FusedWeight(torch.from_numpy(arithmetic.pack(w_MK)), 128, 4, torch.from_numpy(scale_M))
    x = torch.from_numpy(RNG.standard_normal((9, 128)).astype(np.float32)).to(dtype)
    y_NM = choose_kernel(weight, 16)(x, None, dtype).double().numpy()
    expected_NM = x.double().numpy() @ (w_MK * scale_M[:, None].astype(np.float64)).T
    largest = np.abs(x.double().numpy()) @ np.abs(w_MK * scale_M[:, None].astype(np.float64)).T
    assert (np.abs(y_NM - expected_NM) <= 4 * torch.finfo(dtype).eps * largest).all()


@pytest.mark.parametrize("width", [640, 12, 64])
def test_rotates_bit_for_bit(width: int) -> None:
    x_NK = RNG.standard_normal((5, width)).astype(np.float32)
    np.testing.assert_array_equal(rotate_rows(torch.from_numpy(x_NK)).numpy(), Hadamard.of_width(width).apply(x_NK))
