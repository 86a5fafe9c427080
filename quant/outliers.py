"""How heavy-tailed are activations? The measure of outliers, in training and in calibration."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS_AT_A_TIME = 16
"""Of which a float64 copy is made: it stays in the cache."""


def excess_kurtosis(x_ND: Tensor) -> Tensor:
    """The measure of the OSP paper for each token: `relu(mean(x^4) / std(x)^4 - 3)` over channels, float64 [N].

    The fourth moment is about zero and the deviation about the mean. A normal distribution has 0, one channel of D
    that carries everything about D. A token without any spread counts as 0.
    """
    parts = torch.split(x_ND, ROWS_AT_A_TIME)
    return torch.cat([_excess_kurtosis(rows_ND.to(torch.float64, copy=True)) for rows_ND in parts])


def _excess_kurtosis(x_ND: Tensor) -> Tensor:
    """As `excess_kurtosis`; uses `x_ND` up."""
    variance_N1 = (x_ND - x_ND.mean(-1, keepdim=True)).square_().mean(-1, keepdim=True)
    fourth_N = x_ND.square_().div_(variance_N1).square_().mean(-1)
    return torch.where(variance_N1[:, 0] > 0, (fourth_N - 3).relu(), 0.0)
