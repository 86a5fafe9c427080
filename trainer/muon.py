"""Muon (Jordan et al., 2024; arXiv 2502.16982 for its scale): the update of a whole matrix, made orthogonal.

`torch.optim.Muon` computes the same, one matrix after another. Here matrices of equal shape go through Newton–Schulz
together, which costs fewer and larger products, and in float32 too where that is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of X, X Xᵀ X and (X Xᵀ)² X: steep at 0, so that 5 steps bring every singular value near 1."""

MOST_TOGETHER = 2**25
"""The most elements that are orthogonalized together, unless one matrix has more: bounds the memory for it."""


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized; then decoupled weight decay and a step of AdamW's size (RMS 0.2 a element).

    The state of a parameter, and the names in its group, are those of `torch.optim.Muon`, so that the checkpoints of
    one load into the other. Gradients are left as they are.

    Args:
        parameters: matrices, or groups of them.
        dtype: what Newton–Schulz computes in.

    Raises:
        ValueError: a parameter is not a matrix.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        ns_steps: int = 5,
        eps: float = 1e-8,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "ns_steps": ns_steps, "eps": eps}
        super().__init__(parameters, defaults)
        self.dtype = dtype
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            if parameter.ndim != 2:
                raise ValueError(f"Muon is for matrices; a parameter has the shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        for group in self.param_groups:
            for parameters in _alike([parameter for parameter in group["params"] if parameter.grad is not None]):
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        moments = [self._moment(parameter) for parameter in parameters]
        torch._foreach_lerp_(moments, gradients, 1 - group["momentum"])
        # Nesterov: the momentum as it will be when the same gradient comes again.
        ahead = torch._foreach_lerp(gradients, moments, group["momentum"])
        turned = [_wide(update.to(self.dtype)) for update in ahead]
        orthogonal_BNK = orthogonalized(torch.stack(turned), group["ns_steps"], group["eps"])
        for parameter, update_NK in zip(parameters, orthogonal_BNK, strict=True):
            rows, columns = parameter.shape
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(
                update_NK.T if rows > columns else update_NK, alpha=-group["lr"] * 0.2 * math.sqrt(max(rows, columns))
            )

    def _moment(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        moment: Tensor = state["momentum_buffer"]
        return moment


def _alike(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """The parameters by shape, a matrix and its transpose alike, and at most `MOST_TOGETHER` elements at a time."""
    by_shape: dict[tuple[int, ...], list[Tensor]] = {}
    for parameter in parameters:
        by_shape.setdefault(tuple(sorted(parameter.shape)), []).append(parameter)
    for shape, alike in by_shape.items():
        count = max(1, MOST_TOGETHER // math.prod(shape))
        for start in range(0, len(alike), count):
            yield alike[start : start + count]


def _wide(x_NK: Tensor) -> Tensor:
    """With as many columns as rows at least: the product with its transpose is then the smaller one."""
    return x_NK.T if x_NK.shape[0] > x_NK.shape[1] else x_NK


def orthogonalized(x_BNK: Tensor, steps: int = 5, eps: float = 1e-8) -> Tensor:
    """About `U Vᵀ` of each matrix `U S Vᵀ`, by Newton–Schulz: singular values come to 0.7 to 1.2, tiny ones to less.

    Args:
        x_BNK: matrices [B, N, K] with N at most K, in the type to compute in.
        eps: the least Frobenius norm that a matrix is divided by.
    """
    a, b, c = NEWTON_SCHULZ
    norm_B11 = torch.linalg.matrix_norm(x_BNK, keepdim=True)
    x_BNK = x_BNK / norm_B11.clamp(min=eps)  # no singular value is above 1
    for _ in range(steps):
        gram_BNN = x_BNK @ x_BNK.mT
        polynomial_BNN = torch.baddbmm(gram_BNN, gram_BNN, gram_BNN, beta=b, alpha=c)
        x_BNK = torch.baddbmm(x_BNK, polynomial_BNN, x_BNK, beta=a)
    return x_BNK
