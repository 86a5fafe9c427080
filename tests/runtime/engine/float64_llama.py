"""A model by another road than the engine's: whole sequence, float64, dequantized, complex rotary, plain matrices.

Each quantized input goes on from the engine's own codes, once they are seen to be this road's values, rounded: so a
value near a tie, which float32 may round to the other side, spoils no comparison that comes after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from quant import arithmetic
from quant.format import Checkpoint, QuantizedLinear, QuantizedWeight
from quant.hadamard import Hadamard
from quant.scheme import LINEAR_SITES

TIE = {4: 1e-5, 8: 2e-4}
"""How far from a tie, in codes, float32 may carry a value that float64 would round to the other code, by bits."""

Array = NDArray[np.float64]


@dataclass
class EngineCodes:
    """What the engine has quantized, call by call: (codes, scale) of inputs, (codes, scale, zero) of K and V."""

    inputs: list[tuple[NDArray[Any], ...]] = field(default_factory=list)
    cached: list[tuple[NDArray[Any], ...]] = field(default_factory=list)

    def clear(self) -> None:
        self.inputs.clear()
        self.cached.clear()


def recorded_codes(monkeypatch: pytest.MonkeyPatch) -> EngineCodes:
    """Records every call of `arithmetic.quantize` and `arithmetic.quantize_kv` from now on."""
    codes, quantize, quantize_kv = EngineCodes(), arithmetic.quantize, arithmetic.quantize_kv

    def record_input(x: Any, scale: Any, bits: int) -> NDArray[np.int8]:
        q = quantize(x, scale, bits)
        codes.inputs.append((q, np.broadcast_to(scale, (len(q), 1))))
        return q

    def record_kv(x: Any, bits: int) -> Any:
        codes.cached.append(quantize_kv(x, bits))
        return codes.cached[-1]

    monkeypatch.setattr(arithmetic, "quantize", record_input)
    monkeypatch.setattr(arithmetic, "quantize_kv", record_kv)
    return codes


class Float64Llama:
    """The logits of a checkpoint for one sequence."""

    def __init__(self, checkpoint: Checkpoint, codes: EngineCodes) -> None:
        """`codes` are those of the engine's steps over the whole sequence, in order, all logits being wanted."""
        self.checkpoint, self.config = checkpoint, checkpoint.config
        layers = {**checkpoint.linears, "lm_head": checkpoint.head}  # in the order in which a step runs them
        quantized = [name for name, layer in layers.items() if getattr(layer, "input_bits", 16) < 16]
        self.layers, self.inputs = layers, dict(zip(quantized, _by_site(codes.inputs, len(quantized)), strict=True))
        self.kv_bits = checkpoint.scheme.kv_bits if checkpoint.scheme else 16
        self.cached = iter(_by_site(codes.cached, 2 * self.config.num_hidden_layers if self.kv_bits < 16 else 0))

    def logits(self, ids: NDArray[np.int32]) -> Array:
        c, n = self.config, len(ids)
        table = self.checkpoint.embedding
        x = (matrix(table) if isinstance(table, QuantizedWeight) else np.asarray(table, np.float64))[ids]
        for i in range(c.num_hidden_layers):
            site = {short: f"model.layers.{i}.{module}" for short, module in LINEAR_SITES.items()}
            h = self._norm(f"model.layers.{i}.input_layernorm.weight", x)
            q, k, v = (self._linear(site[short], h).reshape(n, -1, c.head_dim) for short in "qkv")
            q, k = self._turned(q), self._turned(k)
            if self.kv_bits == 4:
                spread = Hadamard.of_width(c.head_dim).matrix().T
                q, k = q @ spread, k @ spread
            if self.kv_bits < 16:
                k, v = self._as_cached(k), self._as_cached(v)
            share = c.num_attention_heads // c.num_key_value_heads
            k, v = np.repeat(k, share, 1), np.repeat(v, share, 1)
            scores = np.einsum("qhc,khc->hqk", q, k) / np.sqrt(c.head_dim)
            scores = np.where(np.tri(n, dtype=bool), scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            x = x + self._linear(site["o"], np.einsum("hqk,khc->qhc", weights, v).reshape(n, -1))
            h = self._norm(f"model.layers.{i}.post_attention_layernorm.weight", x)
            gate, up = self._linear(site["gate"], h), self._linear(site["up"], h)
            x = x + self._linear(site["down"], gate / (1 + np.exp(-gate)) * up)
        return self._linear("lm_head", self._norm("model.norm.weight", x))

    def _linear(self, name: str, x: Array) -> Array:
        layer = self.layers[name]
        if not isinstance(layer, QuantizedLinear):
            return x @ np.asarray(layer, np.float64).T
        if layer.rotated:
            x = x @ Hadamard.of_width(x.shape[-1]).matrix().T
        if layer.input_bits == 16:
            return x @ matrix(layer.weight).T
        codes, scale = self.inputs[name]
        lowest, highest = -(2 ** (layer.input_bits - 1)), 2 ** (layer.input_bits - 1) - 1
        wanted = np.abs(x).max(-1, keepdims=True) / highest if layer.input_scale is None else layer.input_scale
        np.testing.assert_allclose(scale, np.broadcast_to(wanted, scale.shape), rtol=1e-5, err_msg=name)
        scale = scale.astype(np.float64)
        distance = np.abs(np.clip(x / scale, lowest, highest) - codes)
        assert distance.max() <= 0.5 + TIE[layer.input_bits], name
        return (codes * scale) @ matrix(layer.weight).T

    def _as_cached(self, x: Array) -> Array:
        codes, scale, zero = (part.astype(np.float64) for part in next(self.cached))
        levels = 2**self.kv_bits - 1
        lowest, highest = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
        # A scale is rounded to 8 significant bits: half a unit of the last one is at most 1/256.
        np.testing.assert_allclose(scale, (highest - lowest) / levels, rtol=2**-8 * 1.01)
        assert np.abs(np.clip(-lowest / scale, 0, levels) - zero).max() <= 0.5 + TIE[self.kv_bits]
        assert np.abs(np.clip(x / scale, -zero, levels - zero) - (codes - zero)).max() <= 0.5 + TIE[self.kv_bits]
        return (codes - zero) * scale

    def _norm(self, name: str, x: Array) -> Array:
        weight = np.asarray(self.checkpoint.norms[name], np.float64)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.config.rms_norm_eps) * weight

    def _turned(self, x: Array) -> Array:
        half = self.config.head_dim // 2
        angle = np.arange(len(x))[:, None] * self.config.rope_theta ** (-np.arange(half) / half)
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None]
        return np.concatenate([turned.real, turned.imag], -1)


def matrix(weight: QuantizedWeight) -> Array:
    """A quantized matrix dequantized, its nibbles read one way of many."""
    codes = weight.stored.astype(np.int64)
    if weight.bits == 4:
        nibbles = np.stack([codes & 15, codes >> 4], -1).reshape(len(codes), -1)[:, : weight.columns]
        codes = np.where(nibbles > 7, nibbles - 16, nibbles)
    return codes * weight.scale.astype(np.float64)[:, None]


def _by_site(calls: list[tuple[NDArray[Any], ...]], sites: int) -> Iterator[tuple[NDArray[Any], ...]]:
    """Of each site, the parts of all steps, one after another."""
    assert len(calls) % sites == 0 if sites else not calls
    for i in range(sites):
        yield tuple(np.concatenate(parts) for parts in zip(*calls[i::sites], strict=True))
