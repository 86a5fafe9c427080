"""The reference runner against transformers, and against a float64 computation of the same 4-bit tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from checkpoints import write_4bit, write_full_precision
from numpy.typing import NDArray
from transformers import LlamaForCausalLM

from quant.format import Checkpoint, QuantizedLinear, read_checkpoint
from runtime.engine.base import SequenceSlice
from runtime.engine.reference import ReferenceRunner

SHAPES: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "one key head": {"num_key_value_heads": 1},
    "a head for each query": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "odd widths": {
        "hidden_size": 39,
        "intermediate_size": 51,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "vocab_size": 83,
    },
    "wide heads": {"head_dim": 24},
    "another theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rms_norm_eps": 1e-3},
}


def prefill(runner: ReferenceRunner, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    table = np.arange(runner.num_blocks, dtype=np.int32)
    return runner.step([SequenceSlice(ids, 0, table, num_logits=len(ids))])


def token_by_token(runner: ReferenceRunner, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    table = np.arange(runner.num_blocks, dtype=np.int32)
    rows = [runner.step([SequenceSlice(ids[i : i + 1], i, table)]) for i in range(len(ids))]
    return np.concatenate(rows)


@pytest.mark.parametrize("run", [prefill, token_by_token])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_match_transformers(tmp_path: Path, shape: dict[str, Any], run: Any) -> None:
    root = write_full_precision(tmp_path / "model", **shape)
    checkpoint = read_checkpoint(root)
    ids = np.random.default_rng(1).integers(0, checkpoint.config.vocab_size, 50).astype(np.int32)
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(root)(torch.tensor(ids[None]).long()).logits[0].numpy()
    assert np.abs(expected).max() > 1  # the comparison says something
    np.testing.assert_allclose(run(ReferenceRunner(checkpoint, block_size=8), ids), expected, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_weights_are_widened_exactly(tmp_path: Path, dtype: str) -> None:
    root = write_full_precision(tmp_path / "model", {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype])
    checkpoint = read_checkpoint(root)
    ids = np.arange(40, dtype=np.int32)
    with torch.no_grad():
        model = LlamaForCausalLM.from_pretrained(root, dtype=torch.float32)
        expected = model(torch.tensor(ids[None]).long()).logits[0].numpy()
    assert checkpoint.precision == dtype
    np.testing.assert_allclose(prefill(ReferenceRunner(checkpoint), ids), expected, atol=1e-4)


def float64_llama(checkpoint: Checkpoint, ids: NDArray[np.int32]) -> NDArray[np.float64]:
    """The logits of a W4A4 model by another road: whole sequence, float64, dequantized, complex rotary."""
    c, n = checkpoint.config, len(ids)
    floats = {name: np.asarray(value, np.float64) for name, value in checkpoint.floats.items()}

    def linear(name: str, x: NDArray[np.float64]) -> NDArray[np.float64]:
        layer = checkpoint.linears[name]
        assert isinstance(layer, QuantizedLinear)
        nibbles = np.stack([layer.packed & 15, layer.packed >> 4], -1).reshape(len(layer.packed), -1)
        codes = np.where(nibbles > 7, nibbles.astype(np.int64) - 16, nibbles)[:, : layer.in_features]
        step = float(layer.input_scale)
        quantized_x = np.clip(np.round(x.astype(np.float32) / np.float32(step)), -8, 7).astype(np.float64) * step
        return quantized_x @ (codes * float(layer.weight_scale)).T

    def norm(name: str, x: NDArray[np.float64]) -> NDArray[np.float64]:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.rms_norm_eps) * floats[f"{name}.weight"]

    def rotate(x: NDArray[np.float64]) -> NDArray[np.float64]:
        half = c.head_dim // 2
        angle = np.arange(n)[:, None] * c.rope_theta ** (-np.arange(half) / half)
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None]
        return np.concatenate([turned.real, turned.imag], -1)

    x = floats["model.embed_tokens.weight"][ids]
    for i in range(c.num_hidden_layers):
        prefix = f"model.layers.{i}"
        h = norm(f"{prefix}.input_layernorm", x)
        q, k, v = (linear(f"{prefix}.self_attn.{p}_proj", h).reshape(n, -1, c.head_dim) for p in "qkv")
        share = c.num_attention_heads // c.num_key_value_heads
        q, k, v = rotate(q), np.repeat(rotate(k), share, 1), np.repeat(v, share, 1)
        scores = np.einsum("qhc,khc->hqk", q, k) / np.sqrt(c.head_dim)
        scores = np.where(np.tri(n, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + linear(f"{prefix}.self_attn.o_proj", np.einsum("hqk,khc->qhc", weights, v).reshape(n, -1))
        h = norm(f"{prefix}.post_attention_layernorm", x)
        gate, up = linear(f"{prefix}.mlp.gate_proj", h), linear(f"{prefix}.mlp.up_proj", h)
        x = x + linear(f"{prefix}.mlp.down_proj", gate / (1 + np.exp(-gate)) * up)
    return norm("model.norm", x) @ np.asarray(checkpoint.head, np.float64).T


@pytest.mark.parametrize("run", [prefill, token_by_token])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_4bit_logits_match_float64(tmp_path: Path, shape: dict[str, Any], run: Any) -> None:
    checkpoint = read_checkpoint(write_4bit(tmp_path / "model", **shape))
    ids = np.random.default_rng(2).integers(0, checkpoint.config.vocab_size, 30).astype(np.int32)
    logits, expected = run(ReferenceRunner(checkpoint), ids), float64_llama(checkpoint, ids)
    # float32 may round a value near a tie to the other code; such a step moves single rows, and shows in few.
    far = np.abs(logits - expected).max(-1) > 1e-4
    assert np.mean(far) < 0.1, np.abs(logits - expected).max(-1)


def test_default_cache_holds_at_least_a_context(full_precision: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    import runtime.engine.reference as reference

    context = full_precision.config.max_position_embeddings
    assert ReferenceRunner(full_precision, block_size=7).num_blocks == 32 * -(-context // 7)
    monkeypatch.setattr(reference, "KV_CACHE_BYTES", 1)
    assert ReferenceRunner(full_precision, block_size=7).num_blocks == -(-context // 7)


def test_info(quantized: Checkpoint) -> None:
    info = ReferenceRunner(quantized).info
    assert (info.engine, info.precision, info.context_length, info.vocab_size) == ("reference", "w4a4", 64, 97)
