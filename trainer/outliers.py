"""How heavy-tailed are the activations? Excess kurtosis and absmax of the residual stream."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor

from trainer.model import OSPModel


def excess_kurtosis(x_ND: Tensor) -> float:
    """The paper's measure: mean over tokens of `relu(mean(x^4) / std(x)^4 - 3)` over channels.

    A normal distribution has 0. One channel of width D that alone carries everything has about D.

    Args:
        x_ND: hidden states, one row a token.
    """
    x_ND = x_ND.double()
    spread_N = x_ND.std(-1, unbiased=False).pow(4).clamp_min(torch.finfo(torch.float64).tiny)
    return float((x_ND.pow(4).mean(-1) / spread_N - 3).relu().mean())


@torch.no_grad()
def residual_outliers(model: OSPModel, ids_BL: Tensor) -> dict[str, list[float]]:
    """`excess_kurtosis` and `absmax` of the residual stream after each block, over the tokens of `ids_BL`."""
    measured: dict[str, list[float]] = {"excess_kurtosis": [], "absmax": []}

    def record(_module: torch.nn.Module, _inputs: tuple[Tensor, ...], hidden_BLD: Tensor) -> None:
        measured["excess_kurtosis"].append(excess_kurtosis(hidden_BLD.flatten(0, 1)))
        measured["absmax"].append(float(hidden_BLD.abs().max()))

    with ExitStack() as hooks:
        for layer in model.layers:
            hooks.callback(layer.register_forward_hook(record).remove)
        model(ids_BL)
    return measured
