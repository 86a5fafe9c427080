"""Runs text through the full-precision model and chooses the static scale of every linear layer's input."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaForCausalLM

from quant.histogram import Histogram
from quant.outliers import excess_kurtosis
from quant.text import TextError

SHARED_INPUTS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""The linear layers of a block, grouped by the tensor that they read: one tensor, one scale."""


@dataclass(frozen=True, slots=True)
class InputRange:
    """The calibrated input of a linear layer.

    Attributes:
        scale: static scale, > 0, with the least squared error over all calibration tokens.
        clip_ratio: `7 * scale / absmax`.
        absmax: largest magnitude seen.
        mse: mean squared error of the input under `scale`.
        excess_kurtosis: see `quant.outliers`; about 0 where there are no outlier channels.
        tokens: how many tokens were seen.
    """

    scale: np.float32
    clip_ratio: float
    absmax: float
    mse: float
    excess_kurtosis: float
    tokens: int


@torch.inference_mode()
def calibrate(
    model: LlamaForCausalLM, windows: Iterable[list[int]], *, progress: bool = False
) -> dict[str, InputRange]:
    """The input range of every linear layer of the body, by module name. Memory does not grow with the text.

    Args:
        windows: token ids, each window no longer than the model's context.

    Raises:
        TextError: a layer saw no token; the message names it.
        NonFiniteError: a layer's input holds NaN or infinity; the message names the layer.
    """
    observers = {
        tuple(f"model.layers.{layer}.{linear}" for linear in linears): _Observer(f"model.layers.{layer}.{linears[0]}")
        for layer in range(model.config.num_hidden_layers)
        for linears in SHARED_INPUTS
    }
    with ExitStack() as hooks:
        for observer in observers.values():
            hooks.callback(model.get_submodule(observer.linear).register_forward_pre_hook(observer.see).remove)
        for window in tqdm(windows, "calibrating", disable=None if progress else True, leave=False):
            model.model(torch.tensor(window)[None], use_cache=False)

    ranges: dict[str, InputRange] = {}
    for names, observer in observers.items():
        ranges |= dict.fromkeys(names, observer.choose())
    return ranges


@dataclass(slots=True)
class _Observer:
    """Sees the input of `linear`, and of the layers that read the same tensor."""

    linear: str
    histogram: Histogram = field(default_factory=Histogram)
    kurtosis_sum: float = 0.0
    tokens: int = 0

    def see(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x_ND = inputs[0].flatten(0, -2)
        self.histogram.add(x_ND.float().numpy(), f"input of {self.linear}")
        self.kurtosis_sum += float(excess_kurtosis(x_ND).sum())
        self.tokens += len(x_ND)

    def choose(self) -> InputRange:
        if self.tokens == 0:
            raise TextError(f"{self.linear} saw no token during calibration")
        choice = self.histogram.choose_scale(f"input of {self.linear}")
        return InputRange(
            scale=choice.scale,
            clip_ratio=choice.clip_ratio,
            absmax=self.histogram.absmax,
            mse=choice.mse,
            excess_kurtosis=self.kurtosis_sum / self.tokens,
            tokens=self.tokens,
        )
