"""A model that can be trained as it will be quantized: rounding in the forward pass, straight through behind it.

The forward pass has the codes of `quant.arithmetic`. The gradient of a rounded value is that of the value itself within
the range of the codes, and zero outside; the gradient of a scale follows from the same rule ("learned step size", Esser
et al., arXiv 1902.08153). Scales are learned as logarithms, and rounded to bfloat16 before they are used, as in the
checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from quant import arithmetic
from quant.format import CheckpointReader
from quant.model import HadamardTransform, load_model, quantize_cache, straight_through, token_scales
from quant.scheme import LINEAR_SITES, SHARED_INPUTS, LinearScheme, Scheme
from quant.weights import QuantizedLinear


class Quantize(torch.autograd.Function):
    """`clip(round(x / scale), lowest, highest)`: codes as floats, of the shape and type of `x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, bits: int) -> Tensor:
        lowest, highest = arithmetic.code_range(bits)
        quotient = x / scale
        codes = quotient.round().clamp(lowest, highest)
        inside = (quotient >= lowest) & (quotient <= highest)
        ctx.save_for_backward(quotient, scale, inside)
        return codes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        quotient, scale, inside = ctx.saved_tensors
        gradient_x = gradients[0] * inside / scale
        # d codes / d scale = -x / scale^2 inside the range: what the codes lose as the scale grows.
        gradient_scale = -(gradient_x * quotient)
        while gradient_scale.ndim > scale.ndim:
            gradient_scale = gradient_scale.sum(0)
        for axis, size in enumerate(scale.shape):
            if size == 1:
                gradient_scale = gradient_scale.sum(axis, keepdim=True)
        return gradient_x, gradient_scale, None


def _quantize(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    codes: Tensor = Quantize.apply(x, scale, bits)  # type: ignore[no-untyped-call]
    return codes


class LearnedScale(nn.Module):
    """A positive scale, one or one a row, learned as a logarithm; it is used as a bfloat16 number."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.logarithm = nn.Parameter(start.log())

    def forward(self) -> Tensor:
        scale = self.logarithm.exp().clamp_min(float(arithmetic.BFLOAT16_TINY))
        return straight_through(scale, scale.bfloat16().float())


class TrainableQuantizedLinear(nn.Module):
    """A linear layer [..., K] -> [..., M] whose weight and input are rounded as `linear` says.

    Attributes:
        weight: float32 [M, K], not rotated: what a 16-bit checkpoint holds.
        weight_scale: [1, 1] or [M, 1].
        input_scale: [1], shared by the layers that read the same tensor; None where there is no static one.
        stored: the type in which the checkpoint will hold the weight.
        rounding: where it is False, this is the linear layer of the 16-bit checkpoint.
    """

    def __init__(
        self,
        weight: Tensor,
        linear: LinearScheme,
        weight_scale: LearnedScale,
        input_scale: LearnedScale | None,
        rotation: HadamardTransform | None,
        stored: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.stored = stored
        self.linear = linear
        self.weight_scale = weight_scale
        self.input_scale = input_scale
        self.rotation = rotation
        self.rounding = True

    def forward(self, x: Tensor) -> Tensor:
        # As the checkpoint will hold it, so that the codes that are trained are those that are written.
        weight = straight_through(self.weight, self.weight.to(self.stored).float())
        if not self.rounding:
            return F.linear(x, weight)
        if self.rotation is not None:
            x, weight = self.rotation(x.float()), self.rotation(weight)
        weight_scale = self.weight_scale()
        codes = _quantize(weight, weight_scale, self.linear.weight_bits)
        scale = weight_scale.squeeze(-1)
        if self.linear.activation_bits < 16:
            x = x.float()
            input_scale = (
                token_scales(x.detach(), self.linear.activation_bits)
                if self.input_scale is None
                else self.input_scale()
            )
            x = _quantize(x, input_scale, self.linear.activation_bits)
            scale = input_scale * scale
        # Codes are small integers, which bfloat16 holds exactly under autocast.
        y: Tensor = F.linear(x, codes).float() * scale
        return y


def stored_type(reader: CheckpointReader) -> torch.dtype:
    """The type that a checkpoint holds its weights in."""
    dtype: torch.dtype = getattr(torch, str(reader.norm("model.norm.weight").dtype))
    return dtype


def trainable_model(reader: CheckpointReader, quantized: CheckpointReader, scheme: Scheme) -> LlamaForCausalLM:
    """The 16-bit model of `reader` in float32, with blocks that round as `quantized` does; its scales are the start."""
    model = load_model(reader)
    stored = stored_type(reader)
    for layer, block in enumerate(model.model.layers):
        quantize_cache(block, scheme.kv_bits)
        for sites in SHARED_INPUTS:
            shared: LearnedScale | None = None
            for site in sites:
                module = LINEAR_SITES[site]
                rounded = quantized.linear(f"model.layers.{layer}.{module}")
                weight = block.get_submodule(module).weight
                if not isinstance(rounded, QuantizedLinear):
                    weight.requires_grad_(True)
                    continue
                if rounded.input_scale is not None and shared is None:
                    shared = LearnedScale(torch.tensor([float(rounded.input_scale)]))
                scale = LearnedScale(torch.from_numpy(rounded.weight.scale)[:, None])
                rotation = HadamardTransform(weight.shape[1]) if rounded.rotated else None
                linear = getattr(scheme, site)
                trainable = TrainableQuantizedLinear(
                    weight.detach(), linear, scale, shared if linear.static else None, rotation, stored
                )
                block.set_submodule(module, trainable)
    for table in (model.model.embed_tokens, model.lm_head):
        table.weight.requires_grad_(True)
    return model


@contextmanager
def unrounded(model: LlamaForCausalLM) -> Iterator[None]:
    """Within it, a trainable model computes as its 16-bit checkpoint does."""
    layers = [module for module in model.modules() if isinstance(module, TrainableQuantizedLinear)]
    attentions: list[Any] = [block.self_attn for block in model.model.layers]
    kv_bits = [attention.kv_bits for attention in attentions]
    try:
        for layer in layers:
            layer.rounding = False
        for attention in attentions:
            attention.kv_bits = 16
        yield
    finally:
        for layer in layers:
            layer.rounding = True
        for attention, bits in zip(attentions, kv_bits, strict=True):
            attention.kv_bits = bits


def parameter_groups(model: LlamaForCausalLM) -> dict[str, list[nn.Parameter]]:
    """Trainable parameters by role: `matrices` of the blocks, `tables` (embedding, head), `scales`. The role follows
    from the module.

    Raises:
        RuntimeError: a trainable parameter would be in no group or in two.
    """
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "tables": [], "scales": []}
    for module in model.model.layers.modules():
        if isinstance(module, TrainableQuantizedLinear | nn.Linear):
            weight: Any = module.weight
            groups["matrices"].append(weight)
        elif isinstance(module, LearnedScale):
            groups["scales"].append(module.logarithm)
    tables = (model.model.embed_tokens.weight, model.lm_head.weight)  # one and the same where they are tied
    groups["tables"] += {id(table): table for table in tables}.values()
    grouped = sorted(id(parameter) for group in groups.values() for parameter in group)
    if grouped != sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad):
        raise RuntimeError("the optimizer groups do not cover every trainable parameter exactly once")
    return groups
