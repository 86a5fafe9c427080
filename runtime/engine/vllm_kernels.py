"""The products of the vLLM plugin's linear layers, and which of them serves a layer.

A kernel is made of a weight when it has been loaded, and called with the rows of a step. The integer kernel takes codes
and the scale of each row; its sums are exact on every device. Shapes: N rows (tokens), K inputs and M outputs of a
linear layer; a fused layer (q, k and v; gate and up) has the outputs of all its parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from runtime.engine.vllm_arithmetic import integer_sums, unpack


@dataclass(frozen=True, slots=True)
class FusedWeight:
    """The weight of a layer, of one or several matrices on top of each other.

    Attributes:
        stored: 4 bits: uint8 [M, ceil(K / 2)] of `quant.arithmetic.pack`; 8 bits: int8 [M, K].
        columns: K.
        bits: 4 or 8.
        scale: float32 [M], one an output: parts with one scale a tensor repeat it.
    """

    stored: Tensor
    columns: int
    bits: int
    scale: Tensor

    @property
    def codes(self) -> Tensor:
        """The codes, int8 [M, K]."""
        return unpack(self.stored, self.columns) if self.bits == 4 else self.stored


class Kernel(Protocol):
    """A product with a weight that it holds in a form of its own."""

    @property
    def name(self) -> str:
        """For the log and for people."""
        ...

    def __call__(self, rows_NK: Tensor, scales_N1: Tensor | None, dtype: torch.dtype, /) -> Tensor:
        """The outputs, [N, M] of type `dtype`.

        Args:
            rows_NK: int8 codes; floats where inputs are not quantized.
            scales_N1: float32, NaN for rows that are lost; None where inputs are not quantized.
        """
        ...


class IntegerKernel:
    """int32 sums by torch (oneDNN, cuBLAS), then `quant.arithmetic`'s one multiply. Holds a byte a weight."""

    name = "int8 products of torch"

    def __init__(self, weight: FusedWeight) -> None:
        self._codes_MK, self._scale_M = weight.codes.contiguous(), weight.scale

    def __call__(self, rows_NK: Tensor, scales_N1: Tensor | None, dtype: torch.dtype) -> Tensor:
        """As `Kernel`: bit for bit the reference's numbers, rounded to `dtype` once."""
        if scales_N1 is None:
            raise ValueError("an integer product takes codes, and the scale of every row")
        return (integer_sums(rows_NK, self._codes_MK).float() * (scales_N1 * self._scale_M)).to(dtype)


class FloatKernel:
    """Inputs of 16 or 32 bits, codes widened in each call, one multiply. Holds a byte a weight."""

    name = "floats times codes, by torch"

    def __init__(self, weight: FusedWeight) -> None:
        self._codes_MK, self._scale_M = weight.codes.contiguous(), weight.scale

    def __call__(self, rows_NK: Tensor, _: Tensor | None, dtype: torch.dtype) -> Tensor:
        """As `Kernel`; the sums are rounded to the type of the inputs before they are scaled."""
        sums_NM = torch.nn.functional.linear(rows_NK, self._codes_MK.to(rows_NK.dtype))
        return (sums_NM.float() * self._scale_M).to(dtype)


def choose_kernel(weight: FusedWeight, input_bits: int) -> Kernel:
    """The kernel that serves a layer whose inputs have 4, 8 or 16 bits."""
    return FloatKernel(weight) if input_bits == 16 else IntegerKernel(weight)
