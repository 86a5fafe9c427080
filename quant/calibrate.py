"""Runs text through the full-precision model, a block at a time, and measures what every linear layer reads.

Hidden states are those of the full-precision model throughout: a layer does not see what quantization has done to the
layers before it. Letting it see that was tried and moved perplexity either way, by less than it cost in time; and so
a run can go on at any layer without the quantized ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from quant import arithmetic
from quant.clip import ClipSearch
from quant.gptq import InputHessian
from quant.histogram import Histogram, clip_ratio
from quant.llama import HEAD
from quant.model import HadamardTransform, token_scales
from quant.outliers import excess_kurtosis
from quant.scheme import LINEAR_SITES, SHARED_INPUTS, LinearScheme, Scheme
from quant.stream import HiddenStates
from quant.text import TextError


@dataclass(frozen=True, slots=True)
class InputStatistics:
    """What was seen of a tensor that linear layers read, as it is quantized: rotated where the scheme rotates it.

    Attributes:
        tokens: how many rows.
        absmax: the largest magnitude.
        excess_kurtosis: mean over tokens of `quant.outliers`, of the tensor as the model computes it; about 0 where
            there are no outlier channels.
        rotated_excess_kurtosis: the same after the rotation; None where there is none.
        scale: the static scale; None where every token has its own, or where the input is not quantized.
        clip_ratio: the largest magnitude that `scale` holds, as a share of `absmax`; None as `scale`.
        mse: mean squared error of rounding the input; None where it is not quantized.
        hessian: of GPTQ, float32 [K, K], if it was asked for.
    """

    tokens: int
    absmax: float
    excess_kurtosis: float
    rotated_excess_kurtosis: float | None
    scale: np.float32 | None
    clip_ratio: float | None
    mse: float | None
    hessian: Tensor | None


@dataclass(frozen=True, slots=True)
class Calibration:
    """What is to be measured.

    Attributes:
        hessians: GPTQ rounds the weights of the blocks and needs the Hessians of their inputs.
        scales: static scales that are known already, by tensor name ("model.layers.0.mlp.down_proj.input_scale").
    """

    scheme: Scheme
    clip: ClipSearch
    hessians: bool = False
    scales: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    @property
    def weights_method(self) -> str:
        """How weights of the blocks are rounded: "rtn" or "gptq"."""
        return "gptq" if self.hessians else "rtn"

    @property
    def needs_text(self) -> bool:
        """Is there an input that is quantized, or that decides how a weight is rounded?"""
        linears = [getattr(self.scheme, site) for site in LINEAR_SITES]
        body = any(linear.weight_bits < 16 and (self.hessians or linear.activation_bits < 16) for linear in linears)
        return body or self.scheme.head.static

    def rotates(self, name: str) -> bool:
        """Does the input of the layer called `name` pass a Hadamard transform in the engine, if it is quantized?"""
        return name.endswith("down_proj") and self.scheme.hadamard != "none"

    def observe_block(self, hidden: HiddenStates, block: LlamaDecoderLayer, layer: int) -> dict[str, InputStatistics]:
        """Advances `hidden` through a float block; the inputs of its linear layers that are quantized, by module name.

        Raises:
            TextError: a layer saw no token; the message names it.
            NonFiniteError: an input holds NaN or infinity; the message names its layer.
        """
        observers: dict[str, InputObserver] = {}
        with ExitStack() as hooks:
            for sites in SHARED_INPUTS:
                quantized = [site for site in sites if getattr(self.scheme, site).weight_bits < 16]
                if quantized:
                    names = [f"model.layers.{layer}.{LINEAR_SITES[site]}" for site in quantized]
                    linear = block.get_submodule(LINEAR_SITES[quantized[0]])
                    assert isinstance(linear, nn.Linear)  # the block is a float one
                    observer = self._observer(names, linear.in_features)
                    hooks.callback(linear.register_forward_pre_hook(observer.see).remove)
                    observers |= dict.fromkeys(names, observer)
            hidden.advance(block)
        statistics = {observer: observer.statistics() for observer in observers.values()}
        seen = {name: statistics[observer] for name, observer in observers.items()}
        kept = {name for name in seen if self.scheme.linear(name).activation_bits == 16}
        # One of those that read a tensor may leave it as it is while the others quantize it.
        return seen | {name: replace(seen[name], scale=None, clip_ratio=None, mse=None) for name in kept}

    @torch.inference_mode()
    def observe_head(self, hidden: HiddenStates, norm: nn.Module) -> InputStatistics:
        """What a head with a static scale reads, once `hidden` has passed all blocks; errors as `observe_block`."""
        observer = InputObserver(HEAD, self.scheme.head, self.clip)
        for state_LD in hidden.states:
            observer.see(norm, (norm(state_LD),))
        return observer.statistics()

    def _observer(self, names: list[str], width: int) -> InputObserver:
        """Of the tensor that the layers called `names` read."""
        linears = {name: self.scheme.linear(name) for name in names}
        # Those that quantize their input do it in one way; the others leave it as it is.
        name, linear = min(linears.items(), key=lambda item: item[1].activation_bits)
        scale = self.scales.get(f"{name}.input_scale")
        return InputObserver(
            name,
            linear,
            self.clip,
            rotation=HadamardTransform(width) if self.rotates(name) else None,
            hessian=InputHessian(width) if self.hessians else None,
            scale=None if scale is None else scale[0],
        )


class InputObserver:
    """Sees the input of the linear layer called `name`, and of those that read the same tensor.

    Memory does not grow with the text.
    """

    def __init__(
        self,
        name: str,
        linear: LinearScheme,
        clip: ClipSearch,
        *,
        rotation: HadamardTransform | None = None,
        hessian: InputHessian | None = None,
        scale: np.float32 | None = None,
    ) -> None:
        self.name, self.linear, self.clip, self.scale = name, linear, clip, scale
        self.rotation, self.hessian = rotation, hessian
        self.histogram = Histogram() if linear.static and scale is None else None
        self.tokens, self.values, self.absmax = 0, 0, 0.0
        self.kurtosis_sum = self.rotated_kurtosis_sum = self.squared_error = 0.0

    def see(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """A forward pre-hook: float32 [..., K].

        Raises:
            NonFiniteError: a value is NaN or infinite.
        """
        x_NK = inputs[0].flatten(0, -2)
        arithmetic.require_finite(x_NK.numpy(), f"input of {self.name}")
        self.kurtosis_sum += float(excess_kurtosis(x_NK).sum())
        if self.rotation is not None:
            x_NK = self.rotation(x_NK)
            self.rotated_kurtosis_sum += float(excess_kurtosis(x_NK).sum())
        self.tokens += len(x_NK)
        self.values += x_NK.numel()
        self.absmax = max(self.absmax, float(x_NK.abs().max()))
        if self.hessian is not None:
            self.hessian.add(x_NK)
        if self.histogram is not None:
            self.histogram.add(x_NK.numpy(), f"input of {self.name}")
        elif self.linear.activation_bits < 16:
            self.squared_error += self._squared_error(x_NK)

    def statistics(self) -> InputStatistics:
        """Of all that was seen.

        Raises:
            TextError: nothing was.
        """
        if self.tokens == 0:
            raise TextError(f"{self.name} saw no token during calibration")
        bits, scale, mse = self.linear.activation_bits, self.scale, self.squared_error / self.values
        if self.histogram is not None:
            name = f"input of {self.name}"
            choice = self.histogram.choose_scale(name, bits, self.clip.norm, self.clip.percentile)
            scale, mse = choice.scale, choice.mse
        ratio = None if scale is None else clip_ratio(scale, self.absmax, bits) if self.absmax > 0 else 1.0
        return InputStatistics(
            tokens=self.tokens,
            absmax=self.absmax,
            excess_kurtosis=self.kurtosis_sum / self.tokens,
            rotated_excess_kurtosis=None if self.rotation is None else self.rotated_kurtosis_sum / self.tokens,
            scale=scale,
            clip_ratio=ratio,
            mse=mse if bits < 16 else None,
            hessian=None if self.hessian is None else self.hessian.matrix,
        )

    def _squared_error(self, x_NK: Tensor) -> float:
        """Of rounding with a scale that is known, or each token with its own."""
        bits = self.linear.activation_bits
        scale = token_scales(x_NK, bits) if self.scale is None else torch.tensor([self.scale])
        codes_NK = torch.round(x_NK / scale).clamp_(*arithmetic.code_range(bits))
        return float((x_NK - codes_NK * scale).double().square_().sum())
