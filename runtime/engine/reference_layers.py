"""What the reference runner computes for each row by itself: linear layers, norms, activations, rotary embedding.

Every row has its own fixed order of summation (see `runtime.engine.reference`). Shapes: N rows, L tokens of one slice,
D model dim, H heads, C head dim, V vocabulary; M outputs and K inputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from quant import arithmetic
from quant.format import QuantizedLinear, QuantizedWeight, Tensor
from quant.hadamard import Hadamard
from quant.llama import LlamaConfig
from runtime.engine.rotary import rotary_frequencies

ROTARY_STEP = 1024
"""The rotary table grows by a multiple of so many positions: a long context costs nothing before it is used."""

Floats = NDArray[np.float32]
RowFunction = Callable[[Floats], Floats]


def linear(layer: Tensor | QuantizedLinear) -> RowFunction:
    """A linear layer of any kind, float32 [N, K] -> float32 [N, M].

    Codes are held widened to the type that they are multiplied in, so that no step converts them.
    """
    if not isinstance(layer, QuantizedLinear):
        weight_MK = widened(layer)
        return lambda x_NK: dot_rows(x_NK, weight_MK)
    run = _weight_only(layer) if layer.input_bits == 16 else _integer(layer)
    if not layer.rotated:
        return run
    transform = hadamard(layer.weight.columns)
    return lambda x_NK: run(transform(x_NK))


def _integer(layer: QuantizedLinear) -> RowFunction:
    weight, input_scale, input_bits = layer.weight, layer.input_scale, layer.input_bits
    weight_bits, scale = weight.bits, weight.scale
    codes_MK = weight.codes.astype(arithmetic.sum_dtype(weight.columns, input_bits, weight_bits))
    return lambda x_NK: arithmetic.quantized_linear(x_NK, input_scale, codes_MK, scale, input_bits, weight_bits)


def _weight_only(layer: QuantizedLinear) -> RowFunction:
    codes_MK, scale = layer.weight.codes.astype(np.float32), layer.weight.scale
    return lambda x_NK: dot_rows(x_NK, codes_MK) * scale


def embedding(table: Tensor | QuantizedWeight) -> Callable[[NDArray[np.int32]], Floats]:
    """The rows [N, D] of token ids [N]. A quantized table stays as it is stored: only these rows are widened."""
    if isinstance(table, QuantizedWeight):
        quantized = table
        return lambda ids_N: replace(
            quantized, stored=quantized.stored[ids_N], scale=quantized.scale[ids_N]
        ).dequantized()
    table_VD = widened(table)
    return lambda ids_N: table_VD[ids_N]


def hadamard(width: int) -> RowFunction:
    """`Hadamard.of_width(width)` over the last axis; additions of whole slices, so that a row's bits are its own."""
    transform = Hadamard.of_width(width)
    return lambda x: np.asarray(transform.apply(x), np.float32)


class RMSNorm:
    """`x / rms(x) * weight` over the last axis."""

    def __init__(self, weight_D: Tensor, eps: float) -> None:
        self._weight_D = widened(weight_D)
        self._eps = np.float32(eps)

    def __call__(self, x_ND: Floats) -> Floats:
        rms_N1: Floats = np.sqrt(np.mean(np.square(x_ND), axis=-1, keepdims=True) + self._eps)
        return x_ND / rms_N1 * self._weight_D


class Rotary:
    """Rotary position embedding (arXiv:2104.09864) in Hugging Face's layout: element i turns with element i + C/2."""

    def __init__(self, config: LlamaConfig) -> None:
        # Frequency and angle are rounded to float32 as in training; cosine and sine are float64's, rounded once.
        self._frequencies = rotary_frequencies(config)
        self._cos_P1C, self._sin_P1C = self._table(0, 0)  # C here is half a head

    def __call__(self, x_LHC: Floats, start: int) -> Floats:
        """Turns rows that stand at positions start, start+1, …"""
        end = start + len(x_LHC)
        known = len(self._cos_P1C)
        if end > known:
            # In whole steps, so that a position's bits do not depend on when the table came to hold it.
            cos, sin = self._table(known, -(-end // ROTARY_STEP) * ROTARY_STEP)
            self._cos_P1C, self._sin_P1C = np.concatenate([self._cos_P1C, cos]), np.concatenate([self._sin_P1C, sin])
        cos, sin = self._cos_P1C[start:end], self._sin_P1C[start:end]
        first, second = np.split(x_LHC, 2, axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    def _table(self, start: int, end: int) -> tuple[Floats, Floats]:
        positions = np.arange(start, end).astype(np.float32)
        angles = (positions[:, None, None] * self._frequencies).astype(np.float64)
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def silu(x: Floats) -> Floats:
    """`x / (1 + exp(-x))`."""
    with np.errstate(over="ignore"):  # exp(-x) may be infinite, and then silu(x) is rightly zero
        decay: Floats = np.exp(-x)
    return x / (1 + decay)


def dot_rows(x_NK: Floats, w_MK: Floats) -> Floats:
    """`x_NK @ w_MK.T`, each output summed in one order whatever N is; without `optimize` einsum calls no BLAS."""
    # einsum sums a single output (N = M = 1) in another order than one of several: the row is computed twice.
    rows_NK = np.repeat(x_NK, 2, axis=0) if len(x_NK) == len(w_MK) == 1 else x_NK
    y_NM: Floats = np.einsum("nk,mk->nm", rows_NK, w_MK, order="C")
    return y_NM[: len(x_NK)]


def widened(weight: Tensor) -> Floats:
    """As float32, which is exact for the types that weights are stored in; no copy of what is float32 already."""
    return np.ascontiguousarray(weight, np.float32)
