"""The reference runner in every scheme: against float64, against the quantizer's torch model; what its cache holds."""

from __future__ import annotations

import dataclasses
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import BASE, write_4bit
from float64_llama import Float64Llama, recorded_codes
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from schemes import CASES, SCHEMES, SHAPES

from quant import arithmetic
from quant.format import Checkpoint, CheckpointReader, read_checkpoint
from quant.hadamard import Hadamard
from quant.llama import LlamaConfig
from quant.model import load_model
from quant.scheme import named
from runtime.engine.reference import ReferenceRunner, _attend
from runtime.engine.reference_cache import PagedCache
from runtime.engine.runner import SequenceSlice

LENGTH = 30
BLOCKS = np.arange(8, dtype=np.int32)


def written(root: Path, scheme: str, shape: str) -> Path:
    return write_4bit(root, scheme=SCHEMES[scheme], **SHAPES[shape])


def prompt(checkpoint: Checkpoint, seed: int) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, checkpoint.config.vocab_size, LENGTH).astype(np.int32)


def logits_in_chunks(runner: ReferenceRunner, ids: NDArray[np.int32], chunk: int) -> NDArray[np.float32]:
    cuts = range(0, len(ids), chunk)
    rows = [
        runner.step([SequenceSlice(part := ids[i : i + chunk], i, BLOCKS, num_logits=len(part))]).rows() for i in cuts
    ]
    return np.concatenate(rows)


@pytest.mark.parametrize("chunk", [1, LENGTH])
@pytest.mark.parametrize(("scheme", "shape"), CASES)
def test_logits_match_float64(
    tmp_path: Path, scheme: str, shape: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = read_checkpoint(written(tmp_path / "model", scheme, shape))
    runner, ids = ReferenceRunner(checkpoint), prompt(checkpoint, 2)
    codes = recorded_codes(monkeypatch)
    logits = logits_in_chunks(runner, ids, chunk)
    assert np.abs(logits).max() > 1  # the comparison says something
    np.testing.assert_allclose(logits, Float64Llama(checkpoint, codes).logits(ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("scheme", "shape"), CASES)
def test_logits_match_the_quantizers_simulation(tmp_path: Path, scheme: str, shape: str) -> None:
    """A value near a tie may get another code in torch, and then all later logits differ: that is rare, and hits one
    prompt of three at most. An error of either engine hits all."""
    root = written(tmp_path / "model", scheme, shape)
    checkpoint, simulation = read_checkpoint(root), load_model(CheckpointReader(root))
    runner, close = ReferenceRunner(checkpoint), []
    for seed in range(3):
        ids = prompt(checkpoint, seed)
        with torch.inference_mode():
            simulated = simulation(torch.tensor(ids[None]).long()).logits[0].numpy()
        close.append(np.allclose(logits_in_chunks(runner, ids, LENGTH), simulated, atol=1e-4, rtol=0))
    assert sum(close) >= 2, close


@pytest.mark.parametrize("head_dim", [2, 6, 8, 24, 64, 128])
def test_the_hadamard_of_4_bit_keys_leaves_attention_as_it_is(head_dim: int) -> None:
    random = np.random.default_rng(head_dim)
    q_HC, keys_PGC, values_PGC = (random.normal(size=(*size, head_dim)) for size in ((4,), (9, 2), (9, 2)))
    transform = Hadamard.of_width(head_dim)
    plain = _attend(q_HC, keys_PGC, values_PGC)
    assert np.abs(transform.apply(keys_PGC) - keys_PGC).max() > 0.1
    rotated = _attend(transform.apply(q_HC), transform.apply(keys_PGC), values_PGC)
    np.testing.assert_allclose(rotated, plain, atol=1e-12)


@pytest.mark.parametrize("scheme", ["all at 4 bits", "w4a8 kv8 head8"])
def test_a_nan_stays_in_its_own_sequence(tmp_path: Path, scheme: str) -> None:
    sound = read_checkpoint(written(tmp_path / "model", scheme, "grouped queries"))
    scale = sound.embedding.scale.copy()
    scale[5] = np.nan
    spoiled = dataclasses.replace(sound, embedding=dataclasses.replace(sound.embedding, scale=scale))
    runners = [ReferenceRunner(checkpoint, num_blocks=3) for checkpoint in (sound, spoiled)]
    rows = [np.array(ids, np.int32) for ids in ([1, 2, 3], [4, 5, 6], [7, 8, 9])]
    batch = [SequenceSlice(ids, 0, np.array([i], np.int32), num_logits=3) for i, ids in enumerate(rows)]
    wanted, got = (runner.step(batch).rows().reshape(3, 3, -1) for runner in runners)
    assert np.isnan(got[1, 1:]).all()
    np.testing.assert_array_equal(got[[0, 2]], wanted[[0, 2]])
    np.testing.assert_array_equal(got[1, 0], wanted[1, 0])
    # The block that a NaN has been in serves another sequence.
    again = [SequenceSlice(rows[2], 0, np.array([1], np.int32), num_logits=3)]
    np.testing.assert_array_equal(runners[1].step(again).rows(), wanted[2])


@given(st.integers(0, 2**32), st.sampled_from([4, 8]), st.sampled_from([2, 6, 64]))
def test_the_cache_gives_back_what_the_specification_says(seed: int, bits: int, head_dim: int) -> None:
    random = np.random.default_rng(seed)
    layers, positions, block_size = 2, 11, 4
    config = config_of(num_hidden_layers=layers, num_key_value_heads=2, head_dim=head_dim)
    cache = PagedCache(config, bits, 5, block_size)
    table = random.permutation(5).astype(np.int32)
    written_LGC = random.standard_cauchy((layers, 2, positions, 2, head_dim)).astype(np.float32)
    start = 0
    while start < positions:
        end = int(random.integers(start, positions)) + 1
        slice_ = SequenceSlice(np.zeros(end - start, np.int32), start, table)
        for layer in range(layers):
            read = cache.extend(layer, slice_, *written_LGC[layer, :, start:end])
            for got, values in zip(read, written_LGC[layer, :, :end], strict=True):
                np.testing.assert_array_equal(got, arithmetic.dequantize_kv(*arithmetic.quantize_kv(values, bits)))
        start = end


def config_of(**sizes: int) -> LlamaConfig:
    return LlamaConfig.from_json(Path(), {**BASE, **sizes})


@pytest.mark.parametrize(("kv_bits", "bytes_per_head"), [(16, 4 * 6), (8, 6 + 3), (4, 3 + 3)])
def test_the_cache_holds_codes_and_three_bytes_a_head(
    tmp_path: Path, kv_bits: int, bytes_per_head: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(num_hidden_layers=3, num_key_value_heads=2, head_dim=6)
    bytes_per_position = 3 * 2 * 2 * bytes_per_head
    assert PagedCache(config, kv_bits, 5, 7).nbytes == 5 * 7 * bytes_per_position
    # So many more positions fit into the same memory.
    monkeypatch.setattr("runtime.engine.kv_capacity.BYTES", 100_000)
    sizes = {"num_hidden_layers": 3, "num_key_value_heads": 2, "head_dim": 6}
    checkpoint = read_checkpoint(write_4bit(tmp_path, scheme=named("w4a4").changed(kv_bits=kv_bits), **sizes))
    assert ReferenceRunner(checkpoint, block_size=7).num_blocks == 100_000 // (7 * bytes_per_position)


def test_a_quantized_embedding_is_never_widened(tmp_path: Path) -> None:
    """Of the tables, a runner makes one wide copy: the head's."""
    sizes = {"vocab_size": 20_000, "hidden_size": 64}
    scheme = named("w4a16").changed(embedding_bits=4)
    checkpoint = read_checkpoint(write_4bit(tmp_path, scheme=scheme, **sizes))
    tracemalloc.start()
    runner = ReferenceRunner(checkpoint, num_blocks=1)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    head_bytes, table_bytes = 20_000 * 64 * 4, 20_000 * 64 // 2
    assert head_bytes < held < head_bytes + table_bytes
    assert runner.step([SequenceSlice(np.array([19_999], np.int32), 0, BLOCKS)]).rows().shape == (1, 20_000)
