"""GPTQ: codes that make up for each other's rounding errors, given what a layer's inputs look like.

It minimizes |(W - Q) X|^2 over the calibration inputs X, a column of W at a time: once a column is rounded, the columns
to its right move so that the output stays as near as it can. Scales are fixed beforehand. What a column's error costs
those to its right stands in U, the upper Cholesky factor of the inverse Hessian, U^T U = H^-1 with H = 2/N X X^T.

Source: Frantar et al., GPTQ, arXiv 2210.17323, algorithm 1. Two things are done otherwise. U is computed without H^-1:
reversing rows and columns of H and factoring L L^T makes U the inverse of L reversed. And a dead input channel, which
was zero in every calibration token, keeps its weights, rounded to nearest: the text may just not have needed it.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quant import arithmetic


class NotPositiveDefiniteError(ValueError):
    """The Hessian of a layer's inputs is not positive definite or not finite; the message names the layer."""


class InputHessian:
    """Sums up `H = 2/N sum x x^T` over a layer's inputs, as they come. float32 [K, K], whatever the number of tokens.

    Attributes:
        tokens: N, how many rows were added.
    """

    def __init__(self, in_features: int) -> None:
        self.tokens = 0
        self._sum_KK = torch.zeros(in_features, in_features)

    def add(self, x_NK: Tensor | NDArray[np.floating]) -> None:
        """Adds rows. What is not finite makes `gptq` refuse the whole."""
        x_NK = torch.as_tensor(x_NK).detach().to(self._sum_KK)
        self._sum_KK.addmm_(x_NK.T, x_NK)
        self.tokens += len(x_NK)

    @property
    def matrix(self) -> Tensor:
        """H, float32 [K, K].

        Raises:
            ValueError: no row was added.
        """
        if self.tokens == 0:
            raise ValueError("a Hessian needs at least one row of inputs")
        return self._sum_KK * (2 / self.tokens)


@torch.inference_mode()
def gptq(
    weight_MK: NDArray[np.floating],
    name: str,
    scales: NDArray[np.float32],
    bits: int,
    hessian_KK: Tensor | NDArray[np.floating],
    block_size: int = 128,
    damping: float = 0.01,
) -> NDArray[np.int8]:
    """The codes of a weight matrix [M, K] under given scales, int8 [M, K].

    Args:
        name: what to call the layer in an error.
        scales: float32 [1] or [M], as of `choose_scales`.
        bits: 4 or 8.
        hessian_KK: of the layer's inputs (`InputHessian.matrix`); it stays as it is.
        block_size: columns after which the errors reach the columns further right. It changes speed, not results.
        damping: what is added to H's diagonal, as a share of its mean over the channels that are not dead.

    Raises:
        NonFiniteError: a weight is NaN or infinite; the message has `name`.
        NotPositiveDefiniteError: the Hessian cannot be factored, is not finite, or is zero.
    """
    arithmetic.require_finite(weight_MK, name)
    factor_KK = _inverse_factor(torch.as_tensor(hessian_KK), name, damping)
    # A copy, which the columns yet to be rounded change in; transposed, so that a column is contiguous.
    left_KM = torch.from_numpy(np.array(weight_MK.T, np.float32, order="C"))
    codes_KM = torch.empty(left_KM.shape, dtype=torch.int8)
    scales_M, code_range = torch.from_numpy(scales), arithmetic.code_range(bits)
    for start in range(0, len(left_KM), block_size):
        block_BM, rest_RM = left_KM[start : start + block_size], left_KM[start + block_size :]
        stop = start + len(block_BM)
        errors_BM = torch.empty_like(block_BM)
        for i, column_M in enumerate(block_BM):
            rounded_M = torch.round(column_M / scales_M).clamp(*code_range)  # `arithmetic.quantize`
            codes_KM[start + i] = rounded_M
            row = factor_KK[start + i]
            errors_BM[i] = (column_M - rounded_M * scales_M) / row[start + i]
            block_BM[i + 1 :].addr_(row[start + i + 1 : stop], errors_BM[i], alpha=-1)
        if not errors_BM.isfinite().all():
            raise NotPositiveDefiniteError(f"{name}: the corrections of GPTQ overflow; its inputs are near-degenerate")
        rest_RM.addmm_(factor_KK[start:stop, stop:].T, errors_BM, alpha=-1)
    return np.ascontiguousarray(codes_KM.numpy().T)


def _inverse_factor(hessian_KK: Tensor, name: str, damping: float) -> Tensor:
    """U with U^T U = (H + damping)^-1, upper, float32; factored in float64."""
    # The reversal also makes the copy that is changed in place from here on.
    reversed_KK = hessian_KK.double().flip(0, 1)
    diagonal_K = reversed_KK.diagonal()
    alive_K = diagonal_K != 0
    if not reversed_KK.isfinite().all() or not alive_K.any():
        raise NotPositiveDefiniteError(f"{name}: the Hessian of its inputs is not finite, or all of them were zero")
    mean = diagonal_K[alive_K].mean()
    diagonal_K[~alive_K] = mean
    diagonal_K += damping * mean
    lower_KK, fault = torch.linalg.cholesky_ex(reversed_KK)
    if fault:
        raise NotPositiveDefiniteError(f"{name}: the Hessian of its inputs is not positive definite")
    del reversed_KK
    inverse_KK = torch.eye(len(lower_KK), dtype=torch.float64)
    torch.linalg.solve_triangular(lower_KK, inverse_KK, upper=False, out=inverse_KK)
    return inverse_KK.float().flip(0, 1)
