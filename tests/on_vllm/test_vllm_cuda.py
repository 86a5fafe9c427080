"""What the products on CUDA cards rest upon, as far as it shows without a card: layouts, exact sums, roundings, and
which kernel is chosen. `benchmarks/gpu.py` has the kernels themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from quant import arithmetic

torch = pytest.importorskip("torch")

from runtime.engine.vllm_choice import cuda_kernel  # noqa: E402
from runtime.engine.vllm_cuda import CutlassKernel, MarlinFloatKernel, MarlinKernel, offset_words, padded_shape  # noqa: E402
from runtime.engine.vllm_kernels import FusedWeight, InputScheme  # noqa: E402

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CODED, FLOATS = InputScheme(4), InputScheme(16)


def weight(outputs: int = 64, columns: int = 128, bits: int = 4, scale: float = 0.03125) -> FusedWeight:
    width = columns // 2 if bits == 4 else columns
    stored = torch.zeros(outputs, width, dtype=torch.uint8 if bits == 4 else torch.int8)
    return FusedWeight(stored, columns, bits, torch.full((outputs,), scale))


@pytest.mark.parametrize(("outputs", "columns"), [(64, 128), (48, 96), (576, 1536), (100, 63)])
def test_words_hold_eight_codes_of_an_output_offset_by_8(outputs: int, columns: int) -> None:
    codes_MK = np.random.default_rng(columns).integers(-8, 8, (outputs, columns)).astype(np.int8)
    padded_m, padded_k = padded_shape(outputs, columns)
    words = offset_words(torch.from_numpy(arithmetic.pack(codes_MK)), padded_m, padded_k).numpy().view(np.uint32)
    assert words.shape == (padded_k // 8, padded_m)
    nibbles_K8M = words[:, None, :] >> (4 * np.arange(8, dtype=np.uint32))[:, None] & 15
    expected_MK = np.zeros((padded_m, padded_k), np.int64)
    expected_MK[:outputs, :columns] = codes_MK
    np.testing.assert_array_equal(nibbles_K8M.astype(np.int64).reshape(padded_k, padded_m).T - 8, expected_MK)


@pytest.mark.parametrize(
    ("shape", "padded"), [((64, 128), (64, 128)), ((128, 64), (128, 64)), ((64, 64), (64, 128)), ((1, 1), (64, 128))]
)
def test_shapes_grow_to_whole_tiles(shape: tuple[int, int], padded: tuple[int, int]) -> None:
    assert padded_shape(*shape) == padded


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("input_bits", [4, 8])
def test_codes_as_16_bit_floats_have_the_integer_s_sums(input_bits: int, dtype: Any) -> None:
    """A tensor core multiplies 16-bit floats exactly and adds in float32: in whatever order, the integers."""
    rng, columns = np.random.default_rng(1), 5504
    lowest, highest = arithmetic.code_range(input_bits)
    x_NK, w_MK = rng.integers(lowest, highest + 1, (33, columns)), rng.integers(-8, 8, (48, columns))
    x_NK[0], w_MK[0] = lowest, -8  # the largest sum there is
    x, w = (torch.from_numpy(codes).to(dtype) for codes in (x_NK, w_MK))
    order = torch.from_numpy(rng.permutation(columns))
    for part in (torch.arange(columns), order):
        sums_NM = x[:, part].float() @ w[:, part].float().T
        np.testing.assert_array_equal(sums_NM.numpy(), x_NK @ w_MK.T)
        split_NM = sum(x[:, p].float() @ w[:, p].float().T for p in part.chunk(7))  # over processors
        np.testing.assert_array_equal(split_NM.numpy(), x_NK @ w_MK.T)


@pytest.mark.parametrize("slices", [1, 5])
def test_scaling_in_turn_rounds_to_the_specification_s_bfloat16_but_near_the_middle(slices: int) -> None:
    """Marlin's epilogue for int8 codes in numpy, beside its epilogue for 16-bit floats, which rounds the sum first."""
    rng = np.random.default_rng(2)
    x_NK, w_MK = rng.integers(-8, 8, (256, 2048)).astype(np.int8), rng.integers(-8, 8, (256, 2048)).astype(np.int8)
    row_N1 = rng.uniform(0.01, 0.3, (256, 1)).astype(np.float32)
    scale_M = arithmetic.round_to_bfloat16(rng.uniform(0.01, 0.1, 256).astype(np.float32))
    parts = np.array_split(np.arange(2048), slices)
    sums = [arithmetic.integer_matmul(x_NK[:, p], w_MK[:, p]).astype(np.float32) for p in parts]
    in_turn_NM = np.zeros((256, 256), np.float32)
    for part_NM in sums:
        in_turn_NM += part_NM * row_N1 * scale_M
    sum_NM = arithmetic.integer_matmul(x_NK, w_MK).astype(np.float32)
    exact_NM = arithmetic.round_to_bfloat16(sum_NM * (row_N1 * scale_M))
    once_NM = arithmetic.round_to_bfloat16(in_turn_NM)
    twice_NM = arithmetic.round_to_bfloat16(arithmetic.round_to_bfloat16(sum_NM) * (row_N1 * scale_M))
    step_NM = np.spacing(np.abs(exact_NM)) * 2.0**16  # of bfloat16
    near_NM = sum(np.abs(part_NM) for part_NM in sums) * row_N1 * scale_M * (slices + 2) * 2.0**-24
    assert (np.abs(once_NM - exact_NM) <= np.maximum(step_NM, near_NM)).all()
    assert (once_NM != exact_NM).mean() < 0.001 < 0.1 < (twice_NM != exact_NM).mean()


@pytest.mark.parametrize(
    ("capability", "dtype", "made_of", "inputs", "kind"),
    [
        ((7, 5), FP16, weight(), CODED, MarlinKernel),
        ((8, 6), BF16, weight(), CODED, MarlinKernel),
        ((9, 0), BF16, weight(100, 64), CODED, MarlinKernel),
        ((12, 0), BF16, weight(), CODED, MarlinKernel),
        ((8, 0), BF16, weight(), FLOATS, MarlinFloatKernel),
        ((8, 9), BF16, weight(bits=8), CODED, CutlassKernel),
        ((7, 5), FP16, weight(bits=8), CODED, CutlassKernel),
        ((7, 5), BF16, weight(), CODED, None),
        ((7, 0), FP16, weight(), CODED, None),
        ((9, 0), FP32, weight(), CODED, None),
        ((9, 0), FP32, weight(bits=8), CODED, None),
        ((9, 0), BF16, weight(bits=8), FLOATS, None),
        ((10, 0), BF16, weight(bits=8), CODED, None),
        ((9, 0), BF16, weight(24, 128, bits=8), CODED, None),
    ],
)
def test_the_first_kernel_that_can_serve_is_chosen(
    capability: Any, dtype: Any, made_of: FusedWeight, inputs: InputScheme, kind: Any
) -> None:
    assert cuda_kernel(made_of, inputs, dtype, capability) is kind


def test_scales_that_float16_does_not_hold_are_no_case_for_marlin() -> None:
    apart = FusedWeight(weight(2).stored, 128, 4, torch.tensor([1.0, 2.0**-30]))
    assert cuda_kernel(apart, CODED, FP16, (8, 0)) is None
    assert cuda_kernel(apart, CODED, BF16, (8, 0)) is MarlinKernel
    tiny = FusedWeight(apart.stored, 128, 4, torch.tensor([2.0**-40, 2.0**-45]))
    assert cuda_kernel(tiny, CODED, FP16, (8, 0)) is MarlinKernel  # a power of two brings them into range
