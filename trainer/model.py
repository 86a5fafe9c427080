"""The training-time model: a Llama whose outlier-breeding parts are replaced by OSP's (arXiv 2506.19697, section 3).

- `SSNorm`: RMSNorm with one learnable scalar instead of a gain for each channel, so that no channel can be
  singled out.
- Embedding projections: a full D x D matrix after the embedding and one before the head spread what Adam's updates
  to the embedding concentrate in a few channels. `export` multiplies them away.

Shapes: B batch, L length, D model width, H heads, C head width, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from trainer.config import RECIPES, ModelConfig, Recipe, RecipeParts


class SSNorm(nn.Module):
    """Single-Scale RMSNorm: `scale * x / rms(x)` with one learnable scalar, initially 1."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.eps = eps

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.scale * _normalize(x_BLD, self.eps)


class RMSNorm(nn.Module):
    """Llama's norm: `weight * x / rms(x)` with a learnable gain a channel, initially 1."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.weight * _normalize(x_BLD, self.eps)


def _normalize(x_BLD: Tensor, eps: float) -> Tensor:
    x_BLD = x_BLD if x_BLD.dtype == torch.float64 else x_BLD.float()
    return x_BLD * torch.rsqrt(x_BLD.square().mean(-1, keepdim=True) + eps)


def make_norm(config: ModelConfig, parts: RecipeParts) -> nn.Module:
    """The recipe's normalization."""
    return SSNorm(config.norm_eps) if parts.single_scale_norms else RMSNorm(config.hidden_size, config.norm_eps)


class Attention(nn.Module):
    """Causal multi-head attention with rotary position embeddings."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x_BLD: Tensor, cos_LC: Tensor, sin_LC: Tensor) -> Tensor:
        q_BHLC, k_BHLC, v_BHLC = (
            projection(x_BLD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BHLC, k_BHLC = rotate(q_BHLC, cos_LC, sin_LC), rotate(k_BHLC, cos_LC, sin_LC)
        mixed_BHLC = F.scaled_dot_product_attention(q_BHLC, k_BHLC, v_BHLC, is_causal=True)
        output_BLD: Tensor = self.o_proj(mixed_BHLC.transpose(1, 2).flatten(2))
        return output_BLD


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        output_BLD: Tensor = self.down_proj(F.silu(self.gate_proj(x_BLD)) * self.up_proj(x_BLD))
        return output_BLD


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, parts: RecipeParts) -> None:
        super().__init__()
        self.input_layernorm = make_norm(config, parts)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = make_norm(config, parts)
        self.mlp = SwiGLU(config)

    def forward(self, x_BLD: Tensor, cos_LC: Tensor, sin_LC: Tensor) -> Tensor:
        x_BLD = x_BLD + self.self_attn(self.input_layernorm(x_BLD), cos_LC, sin_LC)
        x_BLD = x_BLD + self.mlp(self.post_attention_layernorm(x_BLD))
        return x_BLD


class OSPModel(nn.Module):
    """A decoder-only Llama with an untied head; with SSNorm and embedding projections if the recipe has them.

    Module names follow Hugging Face's Llama, so that `export` renames nothing but the norms.

    Args:
        activation_checkpointing: keep only what enters each block for the backward pass, which computes it again.
    """

    def __init__(self, config: ModelConfig, recipe: Recipe, *, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.recipe: Recipe = recipe
        self.activation_checkpointing = activation_checkpointing
        parts, width = RECIPES[recipe], config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.layers = nn.ModuleList(Block(config, parts) for _ in range(config.num_layers))
        self.norm = make_norm(config, parts)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        # Made for every recipe, though some throw them away: so all draw the same numbers for what they share.
        projections = [nn.Linear(width, width, bias=False) for _ in range(2)]
        self.embed_projection: nn.Module = projections[0] if parts.embedding_projections else nn.Identity()
        self.head_projection: nn.Module = projections[1] if parts.embedding_projections else nn.Identity()
        self._initialize()

    def _initialize(self) -> None:
        std = self.config.init_std
        for name, parameter in self.named_parameters():
            if name.startswith(("embed_projection", "head_projection")):
                nn.init.orthogonal_(parameter)
            elif parameter.ndim == 2:
                # The two matrices of a block that write to the residual stream start smaller (GPT-2's rule).
                writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=std / math.sqrt(2 * self.config.num_layers) if writes_residual else std)

    def forward(self, ids_BL: Tensor) -> Tensor:
        """Logits [B, L, V] of the next token at every position of `ids_BL` (int64 [B, L])."""
        hidden_BLD = self.embed_projection(self.embed_tokens(ids_BL))
        cos_LC, sin_LC = rotary_table(self.config, ids_BL.shape[1], hidden_BLD)
        for layer in self.layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                hidden_BLD = checkpoint(layer, hidden_BLD, cos_LC, sin_LC, use_reentrant=False)
            else:
                hidden_BLD = layer(hidden_BLD, cos_LC, sin_LC)
        logits_BLV: Tensor = self.lm_head(self.head_projection(self.norm(hidden_BLD)))
        return logits_BLV


def rotary_table(config: ModelConfig, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [L, C] of the rotary angles, both halves alike (Hugging Face's half-split layout)."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, config.head_dim, 2, dtype=dtype, device=like.device) / config.head_dim
    angles = torch.outer(torch.arange(length, dtype=dtype, device=like.device), config.rope_theta**-exponents)
    return torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()


def rotate(x_BHLC: Tensor, cos_LC: Tensor, sin_LC: Tensor) -> Tensor:
    """Rotates channel i against channel i + C/2 by the position's angle; keeps the type of `x_BHLC`."""
    first, second = x_BHLC.chunk(2, -1)
    turned_BHLC = torch.cat([-second, first], -1)
    return (x_BHLC * cos_LC + turned_BHLC * sin_LC).to(x_BHLC.dtype)
