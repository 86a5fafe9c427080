"""`quant.arithmetic` in torch, as the vLLM plugin computes it: the same codes, the same sums, on any device.

Shapes: N rows (tokens), K inputs and M outputs of a linear layer. What rounds is a custom operator, which a compiler
takes as it is: code that Inductor generates may divide by approximation, and a quotient that is one bit off can be
another code. For the same reason divisors are tensors: torch multiplies by the reciprocal of a number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.arithmetic import BFLOAT16_TINY, code_range
from quant.hadamard import Hadamard, base_matrix, sylvester


@torch.library.custom_op("osp::quantize_rows", mutates_args=())
def quantize_rows(x_NK: Tensor, scale: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes of rows, and the scale of each.

    Args:
        x_NK: of any float type.
        scale: float32 [1] where it is static, or [N, 1] of `token_scales`.
        bits: 4 or 8.

    Returns:
        Codes int8 [N, K] and scales float32 [N, 1], NaN for a row that holds a NaN: so all its outputs become NaN, and
        those of no other row do.
    """
    x_NK = x_NK.float()
    lost_N1 = torch.isnan(x_NK).any(dim=-1, keepdim=True)
    codes_NK = torch.round(x_NK / scale).clamp_(*code_range(bits)).nan_to_num_(0.0).to(torch.int8)
    return codes_NK, torch.where(lost_N1, torch.nan, scale)


@quantize_rows.register_fake
def _(x_NK: Tensor, _scale: Tensor, _bits: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_NK, dtype=torch.int8), x_NK.new_empty((x_NK.shape[0], 1), dtype=torch.float32)


@torch.library.custom_op("osp::token_scales", mutates_args=())
def token_scales(absmax_N1: Tensor, bits: int) -> Tensor:
    """The dynamic scale of every row from its absmax: float32 [N, 1]; 1 for a zero row, NaN for one not finite."""
    highest = torch.full((), float(code_range(bits)[1]), device=absmax_N1.device)
    scales_N1 = (absmax_N1.float() / highest).clamp_min(float(BFLOAT16_TINY))
    scales_N1 = torch.where(absmax_N1 == 0, 1.0, scales_N1)
    return torch.where(torch.isfinite(absmax_N1), scales_N1, torch.nan)


@token_scales.register_fake
def _(absmax_N1: Tensor, _bits: int) -> Tensor:
    return torch.empty_like(absmax_N1, dtype=torch.float32)


@torch.library.custom_op("osp::rotate_rows", mutates_args=())
def rotate_rows(x_NK: Tensor) -> Tensor:
    """`Hadamard.of_width(K)` of every row, float32 [N, K]: on a CPU bit for bit, elsewhere as two products of matrices,
    which sum in another order."""
    width = x_NK.shape[-1]
    transform = Hadamard.of_width(width)
    x_NK = x_NK.float()
    if x_NK.device.type == "cpu":
        return torch.from_numpy(transform.apply(x_NK.contiguous().numpy()))
    base, power = (
        torch.from_numpy(matrix.copy()).to(x_NK) for matrix in (base_matrix(transform.base), sylvester(transform.power))
    )
    blocks = x_NK.reshape(-1, transform.base, transform.power)
    rotated: Tensor = (base @ blocks @ power.T) * (transform.base * transform.power) ** -0.5
    return rotated.reshape(-1, width)


@rotate_rows.register_fake
def _(x_NK: Tensor) -> Tensor:
    return torch.empty_like(x_NK, dtype=torch.float32)


def unpack(packed: Tensor, length: int) -> Tensor:
    """`quant.arithmetic.unpack`: int8 [..., length] from uint8 [..., ceil(length / 2)]."""
    # Shifting the nibble to the top and back as a signed byte extends its sign.
    low, high = (packed << 4).view(torch.int8) >> 4, packed.view(torch.int8) >> 4
    return torch.stack([low, high], dim=-1).flatten(-2)[..., :length]


def integer_sums(codes_NK: Tensor, weight_MK: Tensor) -> Tensor:
    """The exact sums `codes_NK @ weight_MK.T` of int8 codes, int32 [N, M]."""
    rows, outputs = codes_NK.shape[0], weight_MK.shape[0]
    if codes_NK.device.type == "cuda":
        codes_NK, weight_MK = padded_for_cublas(codes_NK, weight_MK)
    return torch._int_mm(codes_NK, weight_MK.T)[:rows, :outputs]


def padded_for_cublas(codes_NK: Tensor, weight_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Both with zeros up to what cuBLAS takes: 17 rows or more, inputs and outputs in multiples of 8."""
    (rows, columns), outputs = codes_NK.shape, weight_MK.shape[0]
    more_rows, more_columns, more_outputs = max(0, 17 - rows), -columns % 8, -outputs % 8
    # Padding by nothing would copy.
    if more_rows or more_columns:
        codes_NK = torch.nn.functional.pad(codes_NK, (0, more_columns, 0, more_rows))
    if more_outputs or more_columns:
        weight_MK = torch.nn.functional.pad(weight_MK, (0, more_columns, 0, more_outputs))
    return codes_NK, weight_MK
