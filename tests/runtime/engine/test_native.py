"""The native runner against the reference: the same logits, the same tokens."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import write_4bit, write_full_precision
from numpy.typing import NDArray
from schemes import CASES, SCHEMES, SHAPES

from benchmarks.greedy import greedy, shortfall
from quant.format import read_checkpoint
from quant.text import windows
from quant.tokenizer import read_tokenizer
from runtime.engine.native import NativeRunner
from runtime.engine.native_library import KernelError, load_library
from runtime.engine.reference import ReferenceRunner
from runtime.engine.runner import SequenceSlice
from runtime.model_store import resolve_model

LENGTH = 40
RELATIVE = 1e-4


def logits_of(runner: NativeRunner | ReferenceRunner, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """Of a whole sequence, its blocks in reverse order. [L, V]"""
    table = np.arange(-(-len(ids) // runner.block_size), dtype=np.int32)[::-1].copy()
    return runner.step([SequenceSlice(ids, 0, table, num_logits=len(ids))]).rows().copy()


def errors(native_LV: NDArray[np.float32], reference_LV: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each row's largest difference, relative to its largest logit."""
    difference: NDArray[np.float32] = np.abs(native_LV - reference_LV).max(axis=-1) / np.abs(reference_LV).max(axis=-1)
    return difference


def random_ids(vocab_size: int, length: int = LENGTH) -> NDArray[np.int32]:
    return np.random.default_rng(11).integers(0, vocab_size, length).astype(np.int32)


def compare(root: Path) -> NDArray[np.float32]:
    """Errors of every row, keys and values of 16 bits rounded alike."""
    checkpoint = read_checkpoint(root)
    ids = random_ids(checkpoint.config.vocab_size)
    reference = ReferenceRunner(checkpoint, kv_float=ml_dtypes.bfloat16)
    return errors(logits_of(NativeRunner(root, threads=2), ids), logits_of(reference, ids))


@pytest.mark.parametrize(("scheme", "shape"), CASES)
def test_logits_of_quantized_models(tmp_path: Path, scheme: str, shape: str) -> None:
    found = compare(write_4bit(tmp_path / "model", scheme=SCHEMES[scheme], **SHAPES[shape]))
    # Floats are summed in another order. Where that carries an activation across the border between two codes, the
    # row differs by a code's worth, and later rows by what they see of it.
    assert (found < RELATIVE).mean() >= 0.75, found
    assert found.max() < 0.1, found


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_in_full_precision(tmp_path: Path, dtype: type, shape: str) -> None:
    found = compare(write_full_precision(tmp_path / "model", dtype, **SHAPES[shape]))
    # A key that lies between two bfloat16 numbers may be rounded to either.
    assert np.median(found) < RELATIVE, found
    assert found.max() < 1e-2, found


@pytest.mark.parametrize("model", ["demo", "demo-16bit"])
def test_greedy_tokens_of_the_bundled_models(model: str) -> None:
    """Prompts from the calibration text; 16 tokens each, all prompts in one batch on the native engine."""
    path = resolve_model(model)
    tokenizer = read_tokenizer(path)
    text = (Path(__file__).parents[3] / "quant" / "calibration.txt").read_text(encoding="utf-8")
    prompts = [window[:64] for window in windows([tokenizer.encode(text).ids], 65)][:12]
    native = NativeRunner(path, threads=2, num_blocks=len(prompts) * 6)
    reference = ReferenceRunner(read_checkpoint(path), num_blocks=8, kv_float=ml_dtypes.bfloat16)
    pairs = zip(prompts, greedy(native, prompts, 16), strict=True)
    # Where an activation lies on the border between two codes, the engines may round it differently, and what follows
    # differs by a code's worth. docs/native-engine.md has the same of 200 prompts of 64 tokens.
    below_NL = np.stack([shortfall(reference, prompt, tokens) for prompt, tokens in pairs])
    assert below_NL.max() < 1
    assert (below_NL > 0).sum() <= 0.02 * below_NL.size


@pytest.mark.parametrize("kernel", load_library().available_kernels())
def test_every_kernel_of_this_processor(kernel: str) -> None:
    path = resolve_model("demo")
    runner = NativeRunner(path, threads=1, num_blocks=8, kernel=kernel)
    ids = random_ids(runner.info.vocab_size)
    reference = ReferenceRunner(read_checkpoint(path), num_blocks=8)
    found = errors(logits_of(runner, ids), logits_of(reference, ids))
    assert runner.kernel == kernel
    assert (found < RELATIVE).mean() >= 0.75, found


def test_a_kernel_that_does_not_exist() -> None:
    with pytest.raises(KernelError, match=r"no kernel 'sse9' here; this processor runs: .*portable"):
        NativeRunner(resolve_model("demo"), kernel="sse9")


def test_steps_of_more_rows_than_the_model_computes_at_a_time() -> None:
    path = resolve_model("demo")
    whole, parts = (NativeRunner(path, threads=1, num_blocks=16, max_rows=rows) for rows in (200, 7))
    ids = random_ids(whole.info.vocab_size, 60)
    tables = [np.array(blocks, np.int32) for blocks in ([0, 1, 2, 3], [7, 6, 5, 4])]
    batch = [SequenceSlice(ids, 0, tables[0], 25), SequenceSlice(ids[:11], 0, tables[1], 1)]
    np.testing.assert_array_equal(whole.step(batch).rows(), parts.step(batch).rows())
    np.testing.assert_array_equal(whole.step(batch).argmax(), parts.step(batch).argmax())


def test_nothing_out_of_range_reaches_the_weights() -> None:
    runner = NativeRunner(resolve_model("demo"), threads=1, num_blocks=2)
    table = np.arange(2, dtype=np.int32)
    ids = np.array([1, 2], np.int32)
    for wrong, message in (
        (SequenceSlice(np.array([4096], np.int32), 0, table), "no token 4096"),
        (SequenceSlice(np.array([-1], np.int32), 0, table), "no token -1"),
        (SequenceSlice(ids, 0, np.array([2], np.int32)), "no KV block 2"),
        (SequenceSlice(ids, 0, np.array([-1], np.int32)), "no KV block -1"),
        (SequenceSlice(ids, 31, table), "position 32 lies beyond"),
        (SequenceSlice(ids, 15, table[:1]), "does not cover position 16"),
        (SequenceSlice(ids, -1, table), "from position -1"),
        (SequenceSlice(ids, 0, table, num_logits=3), "wants 3 logits"),
    ):
        with pytest.raises(ValueError, match=message):
            runner.step([wrong])
    with pytest.raises(ValueError, match="no KV block 0 or 5"):
        runner.copy_blocks([0], [5])
    assert runner.step([SequenceSlice(ids, 0, table)]).argmax()[0] >= 0
