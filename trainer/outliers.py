"""Excess kurtosis and absmax of the residual stream, block by block."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor

from quant.outliers import excess_kurtosis
from trainer.model import OSPModel


@torch.no_grad()
def residual_outliers(model: OSPModel, ids_BL: Tensor) -> dict[str, list[float]]:
    """`excess_kurtosis` and `absmax` of the residual stream after each block, over the tokens of `ids_BL`."""
    measured: dict[str, list[float]] = {"excess_kurtosis": [], "absmax": []}

    def record(_module: torch.nn.Module, _inputs: tuple[Tensor, ...], hidden_BLD: Tensor) -> None:
        measured["excess_kurtosis"].append(float(excess_kurtosis(hidden_BLD.flatten(0, 1)).mean()))
        measured["absmax"].append(float(hidden_BLD.abs().max()))

    with ExitStack() as hooks:
        for layer in model.layers:
            hooks.callback(layer.register_forward_hook(record).remove)
        model(ids_BL)
    return measured
