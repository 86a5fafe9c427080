"""The reference runner in full precision against transformers, in W4A4 against float64; memory. Other schemes:
test_reference_schemes.py."""

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
from float64_llama import Float64Llama, recorded_codes
from numpy.typing import NDArray
from transformers import LlamaForCausalLM

from quant.format import Checkpoint, read_checkpoint
from quant.llama import CheckpointError
from runtime.engine.reference import ReferenceRunner
from runtime.engine.reference_layers import Rotary, dot_rows
from runtime.engine.runner import SequenceSlice

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
    return runner.step([SequenceSlice(ids, 0, table, num_logits=len(ids))]).rows()


def token_by_token(runner: ReferenceRunner, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    table = np.arange(runner.num_blocks, dtype=np.int32)
    rows = [runner.step([SequenceSlice(ids[i : i + 1], i, table)]).rows() for i in range(len(ids))]
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


@pytest.mark.parametrize("run", [prefill, token_by_token])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_4bit_logits_match_float64(
    tmp_path: Path, shape: dict[str, Any], run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = read_checkpoint(write_4bit(tmp_path / "model", **shape))
    ids = np.random.default_rng(2).integers(0, checkpoint.config.vocab_size, 30).astype(np.int32)
    runner = ReferenceRunner(checkpoint)
    codes = recorded_codes(monkeypatch)
    logits = run(runner, ids)
    np.testing.assert_allclose(logits, Float64Llama(checkpoint, codes).logits(ids), atol=1e-4, rtol=0)


def test_a_nan_stays_in_its_own_sequence(quantized: Checkpoint) -> None:
    poisoned = np.array(quantized.embedding, np.float32)
    poisoned[5] = np.nan
    ids = [np.array(row, np.int32) for row in ([1, 2, 3], [4, 5, 6], [7, 8, 9])]
    tables = np.arange(3, dtype=np.int32)[:, None]
    batch = [SequenceSlice(row, 0, table, num_logits=3) for row, table in zip(ids, tables, strict=True)]
    sound, spoiled = (
        ReferenceRunner(checkpoint).step(batch).rows().reshape(3, 3, -1)
        for checkpoint in (quantized, dataclasses.replace(quantized, embedding=poisoned))
    )
    assert np.isnan(spoiled[1, 1:]).all()
    np.testing.assert_array_equal(spoiled[[0, 2]], sound[[0, 2]])
    np.testing.assert_array_equal(spoiled[1, 0], sound[1, 0])


@pytest.mark.parametrize("reduction", [1, 8192, 8193, 20_000, 65_537])
def test_a_dot_product_does_not_depend_on_those_beside_it(reduction: int) -> None:
    random = np.random.default_rng(reduction)
    x_NK, w_MK = (random.normal(size=(rows, reduction)).astype(np.float32) for rows in (5, 4))
    whole = dot_rows(x_NK, w_MK)
    for rows, outputs in itertools.product((1, 2, 5), (1, 2, 4)):
        np.testing.assert_array_equal(dot_rows(x_NK[:rows], w_MK[:outputs]), whole[:rows, :outputs])


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
        rotary = Rotary(config)
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
    context = full_precision.config.max_position_embeddings
    assert ReferenceRunner(full_precision, block_size=7).num_blocks == 32 * -(-context // 7)
    monkeypatch.setattr("runtime.engine.kv_capacity.BYTES", 1)
    assert ReferenceRunner(full_precision, block_size=7).num_blocks == -(-context // 7)


def test_info(quantized: Checkpoint) -> None:
    info = ReferenceRunner(quantized).info
    assert (info.engine, info.precision, info.context_length, info.vocab_size) == ("reference", "w4a4", 64, 97)
