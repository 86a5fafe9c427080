"""Excess kurtosis and absmax of a model's hidden states while it trains: where outliers are, layer by layer.

A *site* is a place in every block: the residual stream after it, and the inputs of its matrices, which are what is
quantized with their weights. Two kinds of text are looked at. *In context*: windows of held-out text, as the quantizer
and every user meet the model. *Single tokens*: each token is a sequence of length 1, as in the paper's published
evaluation (arXiv 2506.19697). There a token attends to itself only, so that what one token in a window draws from
many others does not show.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from quant.outliers import excess_kurtosis
from trainer.model import Block, OSPModel

Site = Literal["residual", "qkv", "o", "gate_up", "down"]
SITES: tuple[Site, ...] = get_args(Site)
"""The residual stream after a block, and what its matrices read: q, k and v one tensor, gate and up another."""


@dataclass(slots=True)
class SiteOutliers:
    """What one site holds, a number for each layer.

    Attributes:
        excess_kurtosis: mean over tokens of `quant.outliers.excess_kurtosis`. It does not look at finiteness: of a
            model with NaN, only `absmax` says so.
        absmax: the largest magnitude of any channel of any token.
    """

    excess_kurtosis: list[float] = field(default_factory=list)
    absmax: list[float] = field(default_factory=list)

    @property
    def mean_kurtosis(self) -> float:
        """Mean over layers."""
        return sum(self.excess_kurtosis) / len(self.excess_kurtosis)

    @property
    def largest(self) -> float:
        """The largest magnitude of any layer; NaN if one is."""
        return math.nan if any(map(math.isnan, self.absmax)) else max(self.absmax)

    def record(self, x_BLD: Tensor) -> None:
        """Measures one layer more."""
        self.excess_kurtosis.append(float(excess_kurtosis(x_BLD.flatten(0, 1)).mean()))
        self.absmax.append(float(x_BLD.abs().max()))


@torch.no_grad()
def measure_outliers(model: OSPModel, ids_BL: Tensor) -> dict[Site, SiteOutliers]:
    """Every site in every layer, over the tokens of `ids_BL` (int64 [B, L], on the model's device).

    Windows of text are measured in context; `single_tokens` of them, each token alone. The model computes in the
    precision of its parameters, unless the caller is under autocast.
    """
    measured: dict[Site, SiteOutliers] = {site: SiteOutliers() for site in SITES}
    with ExitStack() as hooks:
        for block in model.layers:
            assert isinstance(block, Block)
            hooks.callback(block.register_forward_hook(_output_to(measured["residual"])).remove)
            for site, reader in _readers(block).items():
                hooks.callback(reader.register_forward_pre_hook(_input_to(measured[site])).remove)
        model(ids_BL)
    return measured


def single_tokens(windows_BL: Tensor, most: int) -> Tensor:
    """The first `most` tokens of the windows, each a sequence of its own: int64 [N, 1]."""
    return windows_BL.flatten()[:most, None]


def _readers(block: Block) -> dict[Site, nn.Module]:
    """One matrix of those that read a site."""
    attention, mlp = block.self_attn, block.mlp
    return {"qkv": attention.q_proj, "o": attention.o_proj, "gate_up": mlp.gate_proj, "down": mlp.down_proj}


def _output_to(site: SiteOutliers) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    return lambda _module, _inputs, output_BLD: site.record(output_BLD)


def _input_to(site: SiteOutliers) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda _module, inputs: site.record(inputs[0])
