"""Products on CUDA cards: vLLM's own kernels, driven with codes and scales of this format.

All sums are exact: int8 tensor cores add up codes in int32. The sum is multiplied in float32 by the row's scale and by
the output's, one after the other, and rounded to the model's number type, once. Where Marlin splits a sum over K among
the card's processors, it adds the parts when they have been scaled. So an output is the specification's up to a few
roundings of float32, and the same 16-bit number but where it lies that near the middle of two.

Marlin's other form, codes as 16-bit floats, is exact up to the sum too, but rounds it to 16 bits *before* it is scaled:
the product would be rounded twice. It serves inputs that are 16-bit floats anyway. docs/vllm-kernels.md compares them.

Read in vLLM 0.32 and 0.33: `csrc/quantization/marlin`, `_custom_ops.py`. Run on an H200 with the kernels of 0.33.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from runtime.engine.vllm_arithmetic import rotate_rows
from runtime.engine.vllm_kernels import CodedKernel, FusedWeight, InputScheme, Kernel

Capability = tuple[int, int]

HALF_TYPES = (torch.float16, torch.bfloat16)


class MarlinKernel(CodedKernel):
    """int8 codes times 4-bit weights, on int8 tensor cores."""

    name = "Marlin int8 times int4, 4 bits a weight"

    def __init__(self, weight: FusedWeight, inputs: InputScheme, dtype: torch.dtype) -> None:
        """Packs the weight anew. `obstacle` has found nothing."""
        super().__init__(inputs)
        self._weight = _MarlinWeight(weight, dtype, coded_inputs=True)

    @staticmethod
    def obstacle(weight: FusedWeight, dtype: torch.dtype, capability: Capability) -> str | None:
        """Why this kernel cannot serve the weight with outputs of `dtype`; None: it can."""
        return _marlin_obstacle(weight, dtype, capability)

    def multiply(self, codes_NK: Tensor, scales_N1: Tensor, dtype: torch.dtype) -> Tensor:
        """As `CodedKernel`."""
        weight = self._weight
        return weight.product(codes_NK, scales_N1.float().contiguous() * weight.magnitude).to(dtype)


class MarlinFloatKernel(Kernel):
    """16-bit inputs times 4-bit weights: the sums are rounded to 16 bits, then scaled."""

    name = "Marlin float times int4, 4 bits a weight"

    def __init__(self, weight: FusedWeight, inputs: InputScheme, dtype: torch.dtype) -> None:
        """Packs the weight anew. `obstacle` has found nothing."""
        super().__init__(inputs)
        self._weight = _MarlinWeight(weight, dtype, coded_inputs=False)

    @staticmethod
    def obstacle(weight: FusedWeight, dtype: torch.dtype, capability: Capability) -> str | None:
        """As `MarlinKernel.obstacle`."""
        return _marlin_obstacle(weight, dtype, capability)

    def __call__(self, x_NK: Tensor, dtype: torch.dtype) -> Tensor:
        """As `Kernel`."""
        rows_NK = (rotate_rows(x_NK) if self.inputs.rotated else x_NK).to(self._weight.dtype)
        return (self._weight.product(rows_NK, None) * self._weight.magnitude).to(dtype)


class CutlassKernel(CodedKernel):
    """int8 codes times 8-bit weights, on int8 tensor cores."""

    name = "CUTLASS int8, 8 bits a weight"

    def __init__(self, weight: FusedWeight, inputs: InputScheme, _: torch.dtype) -> None:
        """Widens the weight. `obstacle` has found nothing."""
        super().__init__(inputs)
        self._codes_KM, self._scale_1M = weight.codes.contiguous().T, weight.scale[None, :]

    @staticmethod
    def obstacle(weight: FusedWeight, dtype: torch.dtype, capability: Capability) -> str | None:
        """As `MarlinKernel.obstacle`."""
        if weight.columns % 16 or weight.outputs % 16:
            return f"{weight.outputs} outputs or {weight.columns} inputs are no multiple of 16"
        if not (7, 5) <= capability < (10, 0):
            return f"it has no int8 for a card of capability {capability[0]}.{capability[1]}"
        return _half_obstacle(dtype, capability)

    def multiply(self, codes_NK: Tensor, scales_N1: Tensor, dtype: torch.dtype) -> Tensor:
        """As `CodedKernel`."""
        from vllm import _custom_ops as ops

        scales_N1 = scales_N1.float().contiguous()
        y_NM: Tensor = ops.cutlass_scaled_mm(codes_NK, self._codes_KM, scales_N1, self._scale_1M, dtype)
        return y_NM


class _MarlinWeight:
    """A weight as Marlin reads it, padded to whole tiles of its threads.

    Attributes:
        dtype: of the outputs.
        magnitude: a power of two that the outputs are to be multiplied by, so that every scale is a normal number of
            `dtype`, unrounded.
    """

    def __init__(self, weight: FusedWeight, dtype: torch.dtype, coded_inputs: bool) -> None:
        from vllm import _custom_ops as ops
        from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_permute_scales
        from vllm.scalar_type import scalar_types

        self.dtype = dtype
        self.magnitude = _magnitude(weight.scale)
        self._outputs, self._type, self._gemm = weight.outputs, scalar_types.uint4b8, ops.marlin_gemm
        self._padded_m, self._padded_k = padded_shape(weight.outputs, weight.columns)
        words = offset_words(weight.stored, self._padded_m, self._padded_k)
        self._words = ops.gptq_marlin_repack(words, self._padded_k, self._padded_m, 4, is_a_8bit=coded_inputs)
        scale_1M = torch.nn.functional.pad(weight.scale / self.magnitude, (0, self._padded_m - weight.outputs))[None, :]
        self._scale = marlin_permute_scales(
            scale_1M.to(dtype), self._padded_k, self._padded_m, group_size=-1, is_a_8bit=coded_inputs
        )
        self._workspace = _workspace(words.device)

    def product(self, rows_NK: Tensor, scales_N1: Tensor | None) -> Tensor:
        """Of int8 codes with the scale of each row, or of floats without; [N, M] of type `dtype`."""
        rows_NK = torch.nn.functional.pad(rows_NK, (0, self._padded_k - rows_NK.shape[1])).contiguous()
        y_NM: Tensor = self._gemm(
            a=rows_NK,
            c=None,
            b_q_weight=self._words,
            b_bias=None,
            b_scales=self._scale,
            a_scales=scales_N1,
            global_scale=None,
            b_zeros=None,
            workspace=self._workspace,
            b_q_type=self._type,
            size_m=rows_NK.shape[0],
            size_n=self._padded_m,
            size_k=self._padded_k,
            use_atomic_add=False,  # or parts of sums would be rounded to 16 bits
            use_fp32_reduce=True,
        )
        return y_NM[:, : self._outputs]


def padded_shape(outputs: int, columns: int) -> tuple[int, int]:
    """The fewest outputs and inputs that Marlin's tiles cover: (64, 128) or (128, 64) of them."""
    sizes = [
        (math.ceil(outputs / tile_m) * tile_m, math.ceil(columns / tile_k) * tile_k)
        for tile_m, tile_k in ((64, 128), (128, 64))
    ]
    return min(sizes, key=lambda size: (size[0] * size[1], size))


def offset_words(stored: Tensor, padded_m: int, padded_k: int) -> Tensor:
    """The layout of GPTQ, int32 [padded K / 8, padded M]: code + 8 of eight inputs of an output, the first lowest.

    Args:
        stored: uint8 [M, ceil(K / 2)] of `quant.arithmetic.pack`.
    """
    outputs, width = stored.shape
    padded = torch.nn.functional.pad(stored, (0, padded_k // 2 - width, 0, padded_m - outputs))
    # Two's complement and offset by 8 differ in the sign bit; zero codes stay zero.
    words: Tensor = padded.contiguous().view(torch.int32) ^ (0x88888888 - 2**32)
    return words.T.contiguous()


def _magnitude(scale_M: Tensor) -> float:
    """The power of two below the largest scale."""
    return float(2.0 ** math.floor(math.log2(float(scale_M.max()))))


def _marlin_obstacle(weight: FusedWeight, dtype: torch.dtype, capability: Capability) -> str | None:
    if weight.bits != 4:
        return f"its weights have 4 bits, not {weight.bits}"
    if capability < (7, 5):
        return f"it needs a card of capability 7.5, not {capability[0]}.{capability[1]}"
    if (obstacle := _half_obstacle(dtype, capability)) is not None:
        return obstacle
    scale_M = weight.scale / _magnitude(weight.scale)
    if not torch.equal(scale_M.to(dtype).float(), scale_M):
        return f"{str(dtype).removeprefix('torch.')} does not hold the scales of its outputs side by side"
    return None


def _half_obstacle(dtype: torch.dtype, capability: Capability) -> str | None:
    if dtype not in HALF_TYPES:
        return f"it writes no {str(dtype).removeprefix('torch.')}"
    if dtype is torch.bfloat16 and capability < (8, 0):
        return "bfloat16 needs a card of capability 8.0"
    return None


@cache
def _workspace(device: torch.device) -> Any:
    """Marlin's locks on a device, zero between its calls."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return torch.zeros(4 * processors, dtype=torch.int32, device=device)
