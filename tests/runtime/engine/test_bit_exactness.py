"""A token's logits are the same bits whatever surrounds it: batch, chunks, block tables, threads. On every engine."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from checkpoints import ODD_WIDTHS, write_4bit, write_full_precision
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from schemes import SCHEMES, SHAPES

from quant.format import Checkpoint, read_checkpoint
from runtime.engine.native import NativeRunner
from runtime.engine.reference import ReferenceRunner
from runtime.engine.runner import ModelRunner, SequenceSlice

BLOCK_SIZE = 4
LENGTH = 23
SEQUENCES = 33
BLOCKS_EACH = -(-LENGTH // BLOCK_SIZE)


BATCHES = (*range(1, 10), 16, 17, 31, 32, 33)
"""Numbers of sequences about which a BLAS or a vector loop may change its mind."""

QUANTIZED = (
    ("w4a4", "grouped queries"),
    ("w4a4", "odd widths"),
    ("all at 4 bits", "tied"),
    ("all at 4 bits", "odd widths"),
    ("w4a8 kv8 head8", "grouped queries"),
    ("w4a16 kv4", "grouped queries"),
    ("mixed sites", "odd widths"),
)


@pytest.fixture(scope="module", params=[("bfloat16",), ("odd float32",), *QUANTIZED], ids=" ".join)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    root = tmp_path_factory.mktemp("model")
    match request.param:
        case ("bfloat16",):
            return request.getfixturevalue("full_precision")
        case ("odd float32",):
            return read_checkpoint(write_full_precision(root, **ODD_WIDTHS))
        case (scheme, shape):
            return read_checkpoint(write_4bit(root, scheme=SCHEMES[scheme], **SHAPES[shape]))


@pytest.fixture(scope="module", params=["reference", "native"])
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def prompts(checkpoint: Checkpoint) -> NDArray[np.int32]:
    ids = np.random.default_rng(3).integers(0, checkpoint.config.vocab_size, (SEQUENCES, LENGTH))
    return ids.astype(np.int32)


@pytest.fixture(scope="module")
def alone(engine: str, checkpoint: Checkpoint, prompts: NDArray[np.int32]) -> NDArray[np.float32]:
    """What all else is compared with: each sequence by itself, token by token, on one thread. [sequences, length, V]"""
    runner, table = new_runner(engine, checkpoint, threads=1), np.arange(BLOCKS_EACH, dtype=np.int32)
    rows = [
        [runner.step([SequenceSlice(ids[i : i + 1], i, table)]).rows()[0].copy() for i in range(LENGTH)]
        for ids in prompts
    ]
    return np.array(rows)


def new_runner(engine: str, checkpoint: Checkpoint, threads: int = 3) -> ModelRunner:
    """With room for all sequences, whose blocks hold 4 positions (reference) or 16 (native)."""
    if engine == "native":
        return NativeRunner(checkpoint.path, threads=threads, num_blocks=SEQUENCES * BLOCKS_EACH)
    return ReferenceRunner(checkpoint, num_blocks=SEQUENCES * BLOCKS_EACH, block_size=BLOCK_SIZE)


def whole(ids: NDArray[np.int32], table: NDArray[np.int32]) -> SequenceSlice:
    return SequenceSlice(ids, 0, table, num_logits=len(ids))


def test_any_batch_of_whole_prompts(
    engine: str, checkpoint: Checkpoint, prompts: NDArray[np.int32], alone: NDArray[np.float32]
) -> None:
    tables = np.arange(SEQUENCES * BLOCKS_EACH, dtype=np.int32).reshape(SEQUENCES, -1)
    for count in BATCHES:
        batch = [whole(*pair) for pair in zip(prompts[:count], tables, strict=False)]
        logits = new_runner(engine, checkpoint).step(batch).rows()
        np.testing.assert_array_equal(logits.reshape(count, LENGTH, -1), alone[:count])


def test_any_batch_of_decodes(
    engine: str, checkpoint: Checkpoint, prompts: NDArray[np.int32], alone: NDArray[np.float32]
) -> None:
    tables = np.arange(SEQUENCES * BLOCKS_EACH, dtype=np.int32).reshape(SEQUENCES, -1)
    runner = new_runner(engine, checkpoint)
    runner.step([whole(ids[:-1], table) for ids, table in zip(prompts, tables, strict=True)])
    last = [SequenceSlice(ids[-1:], LENGTH - 1, table) for ids, table in zip(prompts, tables, strict=True)]
    for count in BATCHES:
        np.testing.assert_array_equal(runner.step(last[:count]).rows(), alone[:count, -1])


@given(
    cuts=st.lists(st.sets(st.integers(1, LENGTH - 1)), min_size=1, max_size=5),
    shuffle=st.randoms(use_true_random=False),
)
@settings(max_examples=10, deadline=None)
def test_any_chunking_over_scattered_blocks(
    engine: str,
    checkpoint: Checkpoint,
    prompts: NDArray[np.int32],
    alone: NDArray[np.float32],
    cuts: list[set[int]],
    shuffle: object,
) -> None:
    """Each sequence is cut in its own places, the chunks are mixed, and the blocks lie anywhere."""
    runner = new_runner(engine, checkpoint)
    blocks = list(range(runner.num_blocks))
    shuffle.shuffle(blocks)  # type: ignore[attr-defined]
    tables = np.array(blocks, np.int32).reshape(SEQUENCES, -1)
    chunks = [list(pairwise([0, *sorted(places), LENGTH])) for places in cuts]
    logits: list[list[NDArray[np.float32]]] = [[] for _ in chunks]
    while any(chunks):
        ready = [sequence for sequence, left in enumerate(chunks) if left]
        chosen = sorted(shuffle.sample(ready, shuffle.randint(1, len(ready))))  # type: ignore[attr-defined]
        spans = [chunks[sequence].pop(0) for sequence in chosen]
        batch = [
            SequenceSlice(prompts[sequence, start:end], start, tables[sequence], num_logits=end - start)
            for sequence, (start, end) in zip(chosen, spans, strict=True)
        ]
        rows = np.split(runner.step(batch).rows().copy(), np.cumsum([end - start for start, end in spans])[:-1])
        for sequence, part in zip(chosen, rows, strict=True):
            logits[sequence].append(part)
    for sequence, parts in enumerate(logits):
        np.testing.assert_array_equal(np.concatenate(parts), alone[sequence])


def test_logits_are_given_for_the_last_tokens_only(
    engine: str, checkpoint: Checkpoint, prompts: NDArray[np.int32], alone: NDArray[np.float32]
) -> None:
    tables = np.arange(3 * BLOCKS_EACH, dtype=np.int32).reshape(3, -1)
    batch = [SequenceSlice(prompts[i], 0, tables[i], num_logits=count) for i, count in enumerate((0, 1, 5))]
    expected = np.concatenate([alone[1, -1:], alone[2, -5:]])
    np.testing.assert_array_equal(new_runner(engine, checkpoint).step(batch).rows(), expected)


DIGEST = """
import sys, hashlib, numpy as np
from quant.format import read_checkpoint
from runtime.engine.runner import ModelRunner, SequenceSlice
from runtime.engine.native import NativeRunner
from runtime.engine.reference import ReferenceRunner
runner = ReferenceRunner(read_checkpoint(sys.argv[1]))
ids = np.random.default_rng(5).integers(0, runner.info.vocab_size, 64).astype(np.int32)
logits = runner.step([SequenceSlice(ids, 0, np.arange(4, dtype=np.int32), num_logits=64)]).rows()
print(hashlib.sha256(logits.tobytes()).hexdigest())
"""


@pytest.mark.parametrize("scheme", [None, "w4a4", "all at 4 bits", "mixed sites"])
def test_any_number_of_blas_threads(tmp_path: Path, scheme: str | None) -> None:
    """Wide enough for OpenBLAS to use its threads."""
    wide = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512}
    if scheme is None:
        root = write_full_precision(tmp_path / "model", **wide)
    else:
        root = write_4bit(tmp_path / "model", scheme=SCHEMES[scheme], **wide)
    digests = set()
    for threads in ("1", "2", "5"):
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": threads}
        command = [sys.executable, "-c", DIGEST, str(root)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        digests.add(done.stdout.strip())
    assert len(digests) == 1
    assert len(digests.pop()) == hashlib.sha256().digest_size * 2
