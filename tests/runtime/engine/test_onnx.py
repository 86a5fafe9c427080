"""The ONNX Runtime runner against the reference, and a row in a batch against the row alone."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import write_4bit, write_full_precision
from drive import run
from numpy.typing import NDArray
from schemes import CASES, SCHEMES, SHAPES

from quant.format import Checkpoint, read_checkpoint
from quant.llama import CheckpointError
from runtime.engine.base import GenerationRequest, SamplingParams
from runtime.engine.onnx import OnnxRunner
from runtime.engine.onnx_session import OnnxUnavailableError, open_model
from runtime.engine.reference import ReferenceRunner
from runtime.engine.runner import ModelRunner, SequenceSlice

pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

WIDE_HEADS: dict[str, dict[str, Any]] = {"odd widths": {"head_dim": 8}}
"""What a shape needs so that ONNX Runtime takes it."""

SEQUENCES, LENGTH = 8, 19


def prompts(vocab_size: int, seed: int = 0) -> NDArray[np.int32]:
    ids = np.random.default_rng(seed).integers(0, vocab_size, (SEQUENCES, LENGTH))
    return ids.astype(np.int32)


def slot(number: int) -> NDArray[np.int32]:
    return np.array([number], np.int32)


def alone(runner: OnnxRunner, ids_L: NDArray[np.int32], number: int = 0) -> NDArray[np.float32]:
    """The logits of a prompt in two pieces and six single tokens, with nothing else in the batch."""
    cuts = [0, 6, LENGTH - 6, *range(LENGTH - 5, LENGTH + 1)]
    pieces = [SequenceSlice(ids_L[a:b], a, slot(number), b - a) for a, b in itertools.pairwise(cuts)]
    return np.concatenate([runner.step([piece]).rows() for piece in pieces])


@pytest.fixture(scope="module", params=["bfloat16", *(" / ".join(case) for case in CASES)])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    root = tmp_path_factory.mktemp("model")
    if request.param == "bfloat16":
        return read_checkpoint(write_full_precision(root, ml_dtypes.bfloat16))
    scheme, shape = request.param.split(" / ")
    return read_checkpoint(write_4bit(root, scheme=SCHEMES[scheme], **(SHAPES[shape] | WIDE_HEADS.get(shape, {}))))


@pytest.fixture(scope="module")
def runner(checkpoint: Checkpoint) -> OnnxRunner:
    return OnnxRunner(checkpoint.path, threads=1, num_slots=SEQUENCES + 6)


def test_the_reference_within_rounding(checkpoint: Checkpoint, runner: OnnxRunner) -> None:
    """Where a code falls on the other side of a rounding, its sequence differs from there on: one may."""
    assert runner.info.engine == "onnx"
    assert runner.info.precision == checkpoint.precision
    reference = ReferenceRunner(checkpoint)
    tables = np.arange(4, dtype=np.int32)
    differing = 0
    for ids_L in prompts(checkpoint.config.vocab_size):
        expected_LV = reference.step([SequenceSlice(ids_L, 0, tables, LENGTH)]).rows()
        differing += not np.allclose(alone(runner, ids_L), expected_LV, rtol=0, atol=1e-4)
    assert differing <= 1


def test_a_row_in_any_batch_is_the_row_alone(checkpoint: Checkpoint, runner: OnnxRunner) -> None:
    """Prompts and decoding rows together, in scattered slots, with idle ones between that hold others' keys."""
    ids = prompts(checkpoint.config.vocab_size, seed=1)
    expected = [alone(runner, ids_L) for ids_L in ids]
    slots = np.random.default_rng(2).permutation(runner.num_blocks)[:SEQUENCES]
    cuts = [0, 6, LENGTH - 6, *range(LENGTH - 5, LENGTH + 1)]
    given: list[list[NDArray[np.float32]]] = [[] for _ in ids]
    pieces = [0] * SEQUENCES
    rng = np.random.default_rng(3)
    while min(pieces) < len(cuts) - 1:
        going = [i for i in range(SEQUENCES) if pieces[i] < len(cuts) - 1]
        chosen = rng.permutation(going)[: rng.integers(1, len(going) + 1)]
        spans = [(cuts[pieces[i]], cuts[pieces[i] + 1]) for i in chosen]
        batch = [
            SequenceSlice(ids[i, a:b], a, slot(int(slots[i])), b - a) for i, (a, b) in zip(chosen, spans, strict=True)
        ]
        rows = np.split(runner.step(batch).rows(), np.cumsum([b - a for a, b in spans])[:-1])
        for i, part in zip(chosen, rows, strict=True):
            given[i].append(part)
            pieces[i] += 1
    for parts, expected_LV in zip(given, expected, strict=True):
        np.testing.assert_allclose(np.concatenate(parts), expected_LV, rtol=1e-5, atol=1e-5)


def test_a_graph_that_onnx_runtime_may_not_change(
    checkpoint: Checkpoint, runner: OnnxRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ONNX Runtime makes of the graph when it optimises it computes what is written in it."""
    import onnxruntime

    class Unoptimised(onnxruntime.SessionOptions):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL

    monkeypatch.setattr(onnxruntime, "SessionOptions", Unoptimised)
    as_written = OnnxRunner(checkpoint.path, threads=1, num_slots=1)
    differing = 0
    for ids_L in prompts(checkpoint.config.vocab_size, seed=4):
        differing += not np.allclose(alone(as_written, ids_L), alone(runner, ids_L), rtol=0, atol=1e-4)
    assert differing <= 1  # a code on the other side of a rounding


@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_ragged_rows_that_decode_together(quantized: Checkpoint, count: int) -> None:
    """Prompts of 3, 4, 5, … tokens, then four tokens each in one call: each row is the row alone.

    Within 1e-5, and here bit for bit: what a row is computed beside changes none of its sums. How its prompt was cut
    may, which is the same here and there.
    """
    runner = OnnxRunner(quantized.path, threads=1, num_slots=count + 1)
    ids = np.random.default_rng(count).integers(0, quantized.config.vocab_size, (count, count + 7)).astype(np.int32)

    def decoded(numbers: list[int]) -> NDArray[np.float32]:
        for i in numbers:
            runner.step([SequenceSlice(ids[i, : 3 + i], 0, slot(i), 0)])
        steps = [
            runner.step([SequenceSlice(ids[i, at : at + 1], at, slot(i)) for i in numbers for at in [3 + i + step]])
            for step in range(4)
        ]
        return np.stack([step.rows() for step in steps])

    together = decoded(list(range(count)))
    for i in range(count):
        np.testing.assert_array_equal(together[:, i], decoded([i])[:, 0])


def test_logits_of_the_last_tokens_only(checkpoint: Checkpoint, runner: OnnxRunner) -> None:
    ids = prompts(checkpoint.config.vocab_size)[:3]
    batch = [SequenceSlice(ids[i], 0, slot(i), count) for i, count in enumerate((0, 1, 5))]
    whole = [runner.step([SequenceSlice(ids[i], 0, slot(i), LENGTH)]).rows() for i in range(3)]
    np.testing.assert_allclose(
        runner.step(batch).rows(), np.concatenate([whole[1][-1:], whole[2][-5:]]), rtol=0, atol=1e-5
    )
    assert runner.step(batch[:1]).rows().shape == (0, checkpoint.config.vocab_size)


def requests() -> list[GenerationRequest]:
    sampling = SamplingParams(max_tokens=9, temperature=0)
    drawn = SamplingParams(max_tokens=9, seed=3)
    several = [GenerationRequest(f"greedy {i}", tuple(range(i, i + 5 + i)), sampling) for i in range(6)]
    return [*several, GenerationRequest("children", (5, 6, 7), drawn, n=3)]


def test_the_scheduler_copes_with_slots(quantized: Checkpoint) -> None:
    """Too few of them, so that sequences are put off; children copy their parent's. Tokens are the reference's."""

    def generated(runner: ModelRunner) -> dict[tuple[str, int], list[int]]:
        return run(requests(), runner)

    expected = generated(ReferenceRunner(quantized))
    for slots in (3, 16):
        got = generated(OnnxRunner(quantized.path, threads=1, num_slots=slots))
        assert got.keys() == expected.keys()
        assert sum(got[name] != expected[name] for name in got) <= 1  # a code on the other side of a rounding


def test_copied_slots_go_their_own_ways(quantized: Checkpoint) -> None:
    runner = OnnxRunner(quantized.path, threads=1, num_slots=4)
    ids = prompts(97)
    expected = [alone(runner, np.concatenate([ids[0, :10], ids[i, 10:]])) for i in range(3)]
    runner.step([SequenceSlice(ids[0, :6], 0, slot(0), 0)])
    runner.step([SequenceSlice(ids[0, 6:10], 6, slot(0), 0)])
    runner.copy_blocks([0, 0], [3, 1])
    for i, number in enumerate((0, 3, 1)):
        rows = runner.step([SequenceSlice(ids[i, 10:], 10, slot(number), LENGTH - 10)]).rows()
        np.testing.assert_allclose(rows, expected[i][10:], rtol=0, atol=1e-4)


def test_an_overflowing_row_is_lost_and_no_other(tmp_path: Path) -> None:
    """Token 1's embedding is so large that its squares are infinite."""
    from safetensors.numpy import load_file, save_file

    root = write_full_precision(tmp_path / "model", np.float32)
    tensors = load_file(root / "model.safetensors")
    tensors["model.embed_tokens.weight"][1] = 3e38
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    runner = OnnxRunner(root, threads=1, num_slots=3)
    chosen = runner.step([SequenceSlice(np.array([i], np.int32), 0, slot(i)) for i in range(3)]).argmax()
    assert chosen[1] == -1
    assert (chosen[[0, 2]] >= 0).all()


def test_heads_that_onnx_runtime_does_not_take(tmp_path: Path) -> None:
    root = write_4bit(tmp_path / "model", head_dim=6)
    with pytest.raises(CheckpointError, match="heads have a width of 6, and ONNX Runtime takes multiples of 8"):
        OnnxRunner(root)


@pytest.mark.parametrize("version", ["1.24.4", "1.25.1", "1.26.0", "1.33.0.dev20261101", "2.0.0"])
def test_threads_spin_no_longer_than_they_can_be_told(
    quantized: Checkpoint, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr("onnxruntime.__version__", version)
    options = open_model(quantized.path, threads=2).session.get_session_options()
    if version.startswith(("1.24", "1.25")):
        expected = {"session.intra_op.allow_spinning": "0"}
    else:
        expected = {"session.intra_op.allow_spinning": "1", "session.intra_op.spin_duration_us": "50"}
    assert {name: options.get_session_config_entry(name) for name in expected} == expected


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_package_that_is_missing(quantized: Checkpoint, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(OnnxUnavailableError, match=rf"needs the package {package} .*osp-runtime\[onnx\]"):
        OnnxRunner(quantized.path)


def test_torch_is_not_imported(quantized: Checkpoint) -> None:
    check = (
        "import sys; from runtime.engine.registry import load_runner; from pathlib import Path;"
        f"load_runner('onnx', Path({str(quantized.path)!r})); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
