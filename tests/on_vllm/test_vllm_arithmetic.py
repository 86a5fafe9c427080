"""The plugin's arithmetic in torch, against `quant.arithmetic` and numpy: bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from quant import arithmetic
from quant.hadamard import Hadamard

torch = pytest.importorskip("torch")

from runtime.engine.vllm_arithmetic import integer_sums, padded_for_cublas, quantize_rows, rotate_rows, unpack  # noqa: E402

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


@pytest.mark.parametrize(("rows", "columns", "outputs"), [(1, 96, 100), (16, 100, 96), (17, 96, 104), (33, 7, 1)])
def test_sums_are_exact_in_shapes_that_cublas_takes(rows: int, columns: int, outputs: int) -> None:
    """Which are torch's own conditions for `_int_mm` on a card."""
    x_NK, w_MK = codes(rows, columns, 8), codes(outputs, columns, 8)
    padded_x, padded_w = padded_for_cublas(torch.from_numpy(x_NK), torch.from_numpy(w_MK))
    assert len(padded_x) > 16
    assert padded_x.shape[1] % 8 == len(padded_w) % 8 == 0
    sums_NM = torch._int_mm(padded_x, padded_w.T)[:rows, :outputs]
    np.testing.assert_array_equal(sums_NM.numpy(), x_NK.astype(np.int64) @ w_MK.astype(np.int64).T)


def test_inputs_of_bfloat16_are_quantized_as_the_numbers_they_are() -> None:
    x = torch.from_numpy(RNG.standard_normal((16, 64)).astype(np.float32)).bfloat16()
    codes_NK, _ = quantize_rows(x, torch.tensor([0.3125]), 4)
    np.testing.assert_array_equal(codes_NK.numpy(), arithmetic.quantize(x.float().numpy(), np.float32(0.3125)))


@pytest.mark.parametrize("width", [640, 12, 64])
def test_rotates_bit_for_bit(width: int) -> None:
    x_NK = RNG.standard_normal((5, width)).astype(np.float32)
    np.testing.assert_array_equal(rotate_rows(torch.from_numpy(x_NK)).numpy(), Hadamard.of_width(width).apply(x_NK))
