"""How heavy-tailed are activations? The measure of outliers, in training and in calibration."""

from __future__ import annotations

import torch
from torch import Tensor


def excess_kurtosis(x_ND: Tensor) -> Tensor:
    """The measure of the OSP paper for each token: `relu(mean(x^4) / std(x)^4 - 3)` over channels, float64 [N].

    The fourth moment is about zero and the deviation about the mean. A normal distribution has 0, one channel of D
    that carries everything about D. A token without any spread counts as 0.
    """
    x_ND = x_ND.double()
    deviation_N1 = x_ND.std(-1, unbiased=False, keepdim=True)
    fourth_N = (x_ND / deviation_N1).pow(4).mean(-1)
    return torch.where(deviation_N1[:, 0] > 0, (fourth_N - 3).relu(), 0.0)
