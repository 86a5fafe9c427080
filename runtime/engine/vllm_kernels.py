"""What a product of the vLLM plugin's linear layers is, and two that torch alone has, on every device.

A kernel is made of a weight when it has been loaded, and then serves the rows of every step: it rotates and quantizes
them, sums codes exactly, and multiplies once. Shapes: N rows (tokens), K inputs and M outputs of a linear layer; a
fused layer (q, k and v; gate and up) has the outputs of all its parts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.engine.vllm_arithmetic import integer_sums, quantize_rows, rotate_rows, token_scales, unpack


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

    @property
    def outputs(self) -> int:
        """M."""
        return self.stored.shape[0]


@dataclass(frozen=True, slots=True)
class InputScheme:
    """What becomes of a layer's inputs.

    Attributes:
        bits: 4 or 8; 16 where they are not quantized.
        scale: static, float32 [1]; None for one a token.
        rotated: they pass a Hadamard transform first.
    """

    bits: int
    scale: Tensor | None = None
    rotated: bool = False


class Kernel(ABC):
    """A linear layer, with the weight in a form of its own."""

    name: str
    """For the log and for people: what computes, and with how many bits a weight in memory."""

    def __init__(self, inputs: InputScheme) -> None:
        self.inputs = inputs

    @abstractmethod
    def __call__(self, x_NK: Tensor, dtype: torch.dtype) -> Tensor:
        """The layer's outputs, [N, M] of type `dtype`, of rows of any float type."""


class CodedKernel(Kernel):
    """A layer whose inputs are quantized."""

    def __call__(self, x_NK: Tensor, dtype: torch.dtype) -> Tensor:
        """As `Kernel`."""
        inputs = self.inputs
        rows_NK = rotate_rows(x_NK) if inputs.rotated else x_NK
        scale = inputs.scale
        if scale is None:
            scale = token_scales(rows_NK.float().abs().amax(dim=-1, keepdim=True), inputs.bits)
        codes_NK, scales_N1 = quantize_rows(rows_NK, scale, inputs.bits)
        return self.multiply(codes_NK, scales_N1, dtype)

    @abstractmethod
    def multiply(self, codes_NK: Tensor, scales_N1: Tensor, dtype: torch.dtype) -> Tensor:
        """The product alone, [N, M] of type `dtype`, of rows that were quantized elsewhere.

        Args:
            codes_NK: int8, within the bits of the inputs.
            scales_N1: float32, NaN for rows that are lost.
        """


class IntegerKernel(CodedKernel):
    """int32 sums by torch (oneDNN, cuBLAS), then `quant.arithmetic`'s one multiply, rounded to `dtype` once."""

    name = "int8 products of torch, 8 bits a weight"

    def __init__(self, weight: FusedWeight, inputs: InputScheme) -> None:
        super().__init__(inputs)
        self._codes_MK, self._scale_M = weight.codes.contiguous(), weight.scale

    def multiply(self, codes_NK: Tensor, scales_N1: Tensor, dtype: torch.dtype) -> Tensor:
        """As `CodedKernel`: bit for bit the reference's numbers, rounded to `dtype` once."""
        return (integer_sums(codes_NK, self._codes_MK).float() * (scales_N1 * self._scale_M)).to(dtype)


class FloatKernel(Kernel):
    """Inputs of 16 or 32 bits, codes widened in each call, one multiply."""

    name = "floats times codes by torch, 8 bits a weight"

    def __init__(self, weight: FusedWeight, inputs: InputScheme) -> None:
        super().__init__(inputs)
        self._codes_MK, self._scale_M = weight.codes.contiguous(), weight.scale

    def __call__(self, x_NK: Tensor, dtype: torch.dtype) -> Tensor:
        """As `Kernel`; the sums are rounded to the type of the inputs before they are scaled."""
        rows_NK = rotate_rows(x_NK).to(x_NK.dtype) if self.inputs.rotated else x_NK
        sums_NM = torch.nn.functional.linear(rows_NK, self._codes_MK.to(rows_NK.dtype))
        return (sums_NM.float() * self._scale_M).to(dtype)
