"""The reference runner against transformers, and against a float64 computation of the same 4-bit tensors."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from checkpoints import ODD_WIDTHS, write_4bit, write_full_precision
from numpy.typing import NDArray
from transformers import LlamaForCausalLM

from quant import arithmetic
from quant.format import Checkpoint, QuantizedLinear, read_checkpoint
from quant.llama import CheckpointError
from runtime.engine.base import SequenceSlice
from runtime.engine.reference import ReferenceRunner, _dot_rows, _Rotary

SHAPES: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "one key head": {"num_key_value_heads": 1},
    "a head for each query": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "odd widths": ODD_WIDTHS,
    "wide heads": {"head_dim": 24},
    "another theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rms_norm_eps": 1e-3},
}


def prefill(runner: ReferenceRunner, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    table = np.arange(min(runner.num_blocks, 999), dtype=np.int32)
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


TIE = 1e-5
"""How far from a tie, in codes, float32 may carry a value that float64 would round to the other code."""


def float64_llama(
    checkpoint: Checkpoint, ids: NDArray[np.int32], engine_codes: dict[str, NDArray[np.int8]]
) -> NDArray[np.float64]:
    """The logits of a W4A4 model by another road: whole sequence, float64, dequantized, complex rotary.

    Each linear layer goes on from the engine's own codes, once they are seen to be this road's values, rounded: so a
    value near a tie, which float32 may round to the other side, spoils no comparison that comes after it.
    """
    c, n = checkpoint.config, len(ids)
    floats = {name: np.asarray(value, np.float64) for name, value in checkpoint.floats.items()}

    def linear(name: str, x: NDArray[np.float64]) -> NDArray[np.float64]:
        layer = checkpoint.linears[name]
        assert isinstance(layer, QuantizedLinear)
        nibbles = np.stack([layer.packed & 15, layer.packed >> 4], -1).reshape(len(layer.packed), -1)
        codes = np.where(nibbles > 7, nibbles.astype(np.int64) - 16, nibbles)[:, : layer.in_features]
        x_codes = engine_codes[name].astype(np.float64)
        assert x_codes.shape == x.shape
        distance = np.abs(np.clip(x / float(layer.input_scale), -8, 7) - x_codes)
        assert distance.max() <= 0.5 + TIE, name
        return (x_codes * float(layer.input_scale)) @ (codes * float(layer.weight_scale)).T

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


@pytest.fixture
def quantized_inputs(monkeypatch: pytest.MonkeyPatch) -> list[NDArray[np.int8]]:
    """The codes of every call of `arithmetic.quantize` by the engine, in order."""
    calls, quantize = [], arithmetic.quantize

    def record(*arguments: Any) -> NDArray[np.int8]:
        calls.append(quantize(*arguments))
        return calls[-1]

    monkeypatch.setattr(arithmetic, "quantize", record)
    return calls


@pytest.mark.parametrize("run", [prefill, token_by_token])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_4bit_logits_match_float64(
    tmp_path: Path, shape: dict[str, Any], run: Any, quantized_inputs: list[NDArray[np.int8]]
) -> None:
    checkpoint = read_checkpoint(write_4bit(tmp_path / "model", **shape))
    ids = np.random.default_rng(2).integers(0, checkpoint.config.vocab_size, 30).astype(np.int32)
    runner = ReferenceRunner(checkpoint)
    quantized_inputs.clear()  # of what writing the checkpoint has quantized
    logits = run(runner, ids)
    layers = list(checkpoint.linears)  # in the order in which a step runs them
    assert len(quantized_inputs) % len(layers) == 0
    codes = {name: np.concatenate(quantized_inputs[i :: len(layers)]) for i, name in enumerate(layers)}
    np.testing.assert_allclose(logits, float64_llama(checkpoint, ids, codes), atol=1e-4, rtol=0)


def test_a_nan_stays_in_its_own_sequence(quantized: Checkpoint) -> None:
    poisoned = np.array(quantized.floats["model.embed_tokens.weight"], np.float32)
    poisoned[5] = np.nan
    floats = {**quantized.floats, "model.embed_tokens.weight": poisoned}
    ids = [np.array(row, np.int32) for row in ([1, 2, 3], [4, 5, 6], [7, 8, 9])]
    tables = np.arange(3, dtype=np.int32)[:, None]
    batch = [SequenceSlice(row, 0, table, num_logits=3) for row, table in zip(ids, tables, strict=True)]
    sound, spoiled = (
        ReferenceRunner(checkpoint).step(batch).reshape(3, 3, -1)
        for checkpoint in (quantized, dataclasses.replace(quantized, floats=floats))
    )
    assert np.isnan(spoiled[1, 1:]).all()
    np.testing.assert_array_equal(spoiled[[0, 2]], sound[[0, 2]])
    np.testing.assert_array_equal(spoiled[1, 0], sound[1, 0])


@pytest.mark.parametrize("reduction", [1, 8192, 8193, 20_000, 65_537])
def test_a_dot_product_does_not_depend_on_those_beside_it(reduction: int) -> None:
    random = np.random.default_rng(reduction)
    x_NK, w_MK = (random.normal(size=(rows, reduction)).astype(np.float32) for rows in (5, 4))
    whole = _dot_rows(x_NK, w_MK)
    for rows, outputs in itertools.product((1, 2, 5), (1, 2, 4)):
        np.testing.assert_array_equal(_dot_rows(x_NK[:rows], w_MK[:outputs]), whole[:rows, :outputs])


def with_context(checkpoint: Checkpoint, positions: int) -> Checkpoint:
    return dataclasses.replace(
        checkpoint, config=dataclasses.replace(checkpoint.config, max_position_embeddings=positions)
    )


def test_rotary_is_that_of_the_whole_table_however_it_is_reached(full_precision: Checkpoint) -> None:
    config, reach = full_precision.config, 5000
    half = config.head_dim // 2
    frequencies = (config.rope_theta ** -(np.arange(half) / half)).astype(np.float32)
    angles = (np.arange(reach, dtype=np.float32)[:, None] * frequencies).astype(np.float64)
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
    ones_LHC = np.zeros((reach, 1, config.head_dim), np.float32)
    ones_LHC[..., :half] = 1  # turned, they are cosine and sine
    for cuts in ([0, reach], [0, 1, 2, 3, 1023, 1024, 1025, 3000, reach], [4990, reach, 17, 18]):
        rotary = _Rotary(config)
        for start, end in itertools.pairwise(cuts):
            if start < end:
                np.testing.assert_array_equal(rotary(ones_LHC[start:end], start)[:, 0], table[start:end])


def test_a_long_context_costs_nothing_before_it_is_used(full_precision: Checkpoint) -> None:
    runner = ReferenceRunner(with_context(full_precision, 2**22))
    assert runner.info.context_length == runner.num_blocks * runner.block_size == 2**22
    ids = np.arange(20, dtype=np.int32)
    np.testing.assert_array_equal(prefill(runner, ids), prefill(ReferenceRunner(full_precision), ids))


@pytest.mark.parametrize("num_blocks", [None, 2**44, 2**60])
def test_a_context_beyond_memory_is_refused(full_precision: Checkpoint, num_blocks: int | None) -> None:
    with pytest.raises(CheckpointError, match=r"KV cache for \d+ positions takes .* lower max_position_embeddings"):
        ReferenceRunner(with_context(full_precision, 2**31 - 1), num_blocks)


def test_default_cache_holds_at_least_a_context(full_precision: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    import runtime.engine.reference as reference

    context = full_precision.config.max_position_embeddings
    assert ReferenceRunner(full_precision, block_size=7).num_blocks == 32 * -(-context // 7)
    monkeypatch.setattr(reference, "KV_CACHE_BYTES", 1)
    assert ReferenceRunner(full_precision, block_size=7).num_blocks == -(-context // 7)


def test_info(quantized: Checkpoint) -> None:
    info = ReferenceRunner(quantized).info
    assert (info.engine, info.precision, info.context_length, info.vocab_size) == ("reference", "w4a4", 64, 97)
