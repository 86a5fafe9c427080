"""The torch model of a checkpoint: float32, or, for a quantized one, simulated with the integers of `quant.arithmetic`.

Weights come from a `WeightSource`, so that a model can be built a block at a time and need never be in memory whole.
Shapes: B batch, L length, D model width, H heads, C head width, N rows, K inputs and M outputs of a linear layer.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from quant import arithmetic, llama
from quant.hadamard import Hadamard, base_matrix, sylvester
from quant.scheme import LINEAR_SITES, Scheme
from quant.weights import QuantizedLinear, QuantizedWeight

ATTENTION = "osp"
"""What the attention of this module is called in transformers' registry."""

LARGEST_SYLVESTER = 128
"""The order up to which a Sylvester matrix is multiplied with as it is."""

Weight = NDArray[Any] | QuantizedLinear


class WeightSource(Protocol):
    """Where a model's weights come from: a `CheckpointReader`, or a view of one that changes them."""

    @property
    def path(self) -> Path: ...
    @property
    def config(self) -> llama.LlamaConfig: ...
    @property
    def scheme(self) -> Scheme | None: ...
    def linear(self, name: str) -> Weight: ...
    def embedding(self) -> NDArray[Any] | QuantizedWeight: ...
    def head(self) -> Weight: ...
    def norm(self, name: str) -> NDArray[Any]: ...


class HadamardTransform(nn.Module):
    """`Hadamard.apply` over the last axis, as matrix products: equal to it up to the order of summation."""

    base: Tensor
    high: Tensor
    low: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shape = Hadamard.of_width(width)
        root = (self.shape.base * self.shape.power) ** -0.5
        # A Sylvester matrix is the Kronecker product of smaller ones: two of order 64 to 128 rather than one of 8,192.
        low = min(self.shape.power, LARGEST_SYLVESTER)
        matrices = {
            "base": base_matrix(self.shape.base) * root,
            "high": sylvester(self.shape.power // low).astype(np.float64),
            "low": sylvester(low).astype(np.float64),
        }
        for name, matrix in matrices.items():
            self.register_buffer(name, torch.from_numpy(matrix), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, len(self.high), len(self.low)) @ self.low.to(x.dtype)
        if len(self.high) > 1:
            rows = self.high.to(x.dtype) @ rows
        return (self.base.to(x.dtype) @ rows.reshape(-1, self.shape.base, self.shape.power)).reshape(x.shape)


class SimulatedLinear(nn.Module):
    """A `QuantizedLinear` in torch: float32 [..., K] -> float32 [..., M].

    Integer layers give the bits of `arithmetic.quantized_linear` where their input is not rotated. NaN is not handled.
    """

    weight_codes: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        self.input_bits = linear.input_bits
        self.rotation = HadamardTransform(linear.weight.columns) if linear.rotated else None
        dtype = np.dtype(np.float32)
        if linear.input_bits < 16:
            dtype = arithmetic.sum_dtype(linear.weight.columns, linear.input_bits, linear.weight.bits)
        self.register_buffer("weight_codes", torch.from_numpy(linear.weight.codes.astype(dtype)))
        self.register_buffer("weight_scale", torch.from_numpy(linear.weight.scale))
        # A tensor, not a Python number: torch may turn a division by a number into a product with its reciprocal.
        scale = None if linear.input_scale is None else torch.tensor([linear.input_scale], dtype=torch.float32)
        self.register_buffer("input_scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.rotation is not None:
            x = self.rotation(x)
        if self.input_bits == 16:
            return F.linear(x, self.weight_codes) * self.weight_scale
        scale = token_scales(x, self.input_bits) if self.input_scale is None else self.input_scale
        codes = torch.round(x / scale).clamp(*arithmetic.code_range(self.input_bits))
        sums = F.linear(codes.to(self.weight_codes.dtype), self.weight_codes).float()
        return sums * (scale * self.weight_scale)


class DequantizedEmbedding(nn.Embedding):
    """A quantized embedding, widened."""

    def __init__(self, table: QuantizedWeight) -> None:
        rows, columns = table.shape
        super().__init__(rows, columns, _weight=torch.from_numpy(table.dequantized()))


def token_scales(x: Tensor, bits: int) -> Tensor:
    """`arithmetic.token_scales` of finite rows: [..., 1]."""
    absmax = x.abs().amax(-1, keepdim=True)
    highest = torch.tensor(arithmetic.code_range(bits)[1], dtype=x.dtype, device=x.device)
    scales = (absmax / highest).clamp_min(float(arithmetic.BFLOAT16_TINY))
    return torch.where(absmax == 0, 1.0, scales)


def simulate_kv(x: Tensor, bits: int) -> Tensor:
    """Quantizes and dequantizes keys or values [..., C] as `arithmetic.quantize_kv` does; finite ones only."""
    levels = torch.tensor(2**bits - 1, dtype=x.dtype, device=x.device)
    lowest, highest = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    scale = (highest / levels - lowest / levels).bfloat16().to(x.dtype)
    scale = scale.clamp(float(arithmetic.BFLOAT16_TINY), float(arithmetic.BFLOAT16_MAX))
    scale = torch.where((lowest == 0) & (highest == 0), 1.0, scale)
    zero = torch.round(-lowest / scale).clamp(min=0).minimum(levels)
    codes = (torch.round(x / scale) + zero).clamp(min=0).minimum(levels)
    return (codes - zero) * scale


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Causal attention of unpadded windows, over keys and values as the cache would hold them. All [B, heads, L, C]."""
    kv_bits = getattr(module, "kv_bits", 16)
    if kv_bits == 4:
        query, key = module.qk_rotation(query), module.qk_rotation(key)  # type: ignore[operator]
    if kv_bits < 16:
        key, value = (straight_through(x, simulate_kv(x, kv_bits)) for x in (key, value))
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return mixed.transpose(1, 2), None


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of `x` where there is one."""
    return x + (rounded - x).detach() if x.requires_grad else rounded


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)


def quantize_cache(block: LlamaDecoderLayer, kv_bits: int) -> None:
    """Makes the attention of a block see keys and values of so many bits."""
    attention: Any = block.self_attn
    attention.kv_bits = kv_bits
    attention.qk_rotation = HadamardTransform(attention.head_dim) if kv_bits == 4 else None


class CheckedLlamaConfig(LlamaConfig):  # type: ignore[no-untyped-call]
    """One that `quant.llama` has checked. Heads have a width of their own: the model's need be no multiple of them."""

    def validate_architecture(self) -> None:
        """Takes the place of transformers' check."""


def transformers_config(source: WeightSource) -> LlamaConfig:
    """The model's shape as transformers has it, with the attention of this module.

    Of config.json it has what `quant.llama` reads and no more: transformers refuses fields that compute nothing here.
    """
    fields = asdict(source.config)
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    fields |= {"bos_token_id": None, "eos_token_id": None}  # whose defaults a small vocabulary may not have
    return CheckedLlamaConfig.from_dict(fields, attn_implementation=ATTENTION)


def build_block(source: WeightSource, config: LlamaConfig, layer: int) -> LlamaDecoderLayer:
    """One transformer block with its weights, float32, for inference. `config` is that of `transformers_config`."""
    prefix = f"model.layers.{layer}"
    with torch.device("meta"):  # allocates and initializes nothing
        block = LlamaDecoderLayer(config, layer)
    state: dict[str, Tensor] = {}
    for suffix in LINEAR_SITES.values():
        linear = source.linear(f"{prefix}.{suffix}")
        if isinstance(linear, QuantizedLinear):
            block.set_submodule(suffix, SimulatedLinear(linear))
            state |= block.get_submodule(suffix).state_dict(prefix=f"{suffix}.")
        else:
            state[f"{suffix}.weight"] = widened(linear)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        state[f"{norm}.weight"] = widened(source.norm(f"{prefix}.{norm}.weight"))
    block.load_state_dict(state, strict=True, assign=True)
    quantize_cache(block, source.scheme.kv_bits if source.scheme else 16)
    return block.train(False).requires_grad_(False)


def build_embedding(source: WeightSource) -> nn.Embedding:
    """The embedding, float32, for inference."""
    table = source.embedding()
    if isinstance(table, QuantizedWeight):
        return DequantizedEmbedding(table).requires_grad_(False)
    return nn.Embedding(table.shape[0], table.shape[1], _weight=widened(table)).requires_grad_(False)


def build_norm(source: WeightSource) -> LlamaRMSNorm:
    """The norm before the head, float32, for inference."""
    norm = LlamaRMSNorm(source.config.hidden_size, source.config.rms_norm_eps)
    norm.weight = nn.Parameter(widened(source.norm("model.norm.weight")), requires_grad=False)
    return norm


def build_head(source: WeightSource) -> nn.Module:
    """The head, without the norm before it, float32, for inference."""
    head = source.head()
    if isinstance(head, QuantizedLinear):
        return SimulatedLinear(head)
    linear = nn.Linear(head.shape[1], head.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(widened(head), requires_grad=False)
    return linear


def load_model(source: WeightSource) -> LlamaForCausalLM:
    """The whole model in a float32 `LlamaForCausalLM` for inference, with causal attention over unpadded windows."""
    config = transformers_config(source)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # computed, not stored, so it must not stay on "meta"
    model.model.embed_tokens = build_embedding(source)
    for layer in range(config.num_hidden_layers):
        model.model.layers[layer] = build_block(source, config, layer)
    model.model.norm = build_norm(source)
    model.lm_head = build_head(source)
    if config.tie_word_embeddings and isinstance(model.lm_head, nn.Linear):
        model.lm_head.weight = model.model.embed_tokens.weight
    model.train(False)
    model.requires_grad_(False)
    return model


def widened(values: NDArray[Any]) -> Tensor:
    """As a float32 tensor."""
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))
