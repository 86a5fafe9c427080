"""What ONNX Runtime's graph runs on: asked for by name, proven, reported, and refused where it does not run.

`OSP_TEST_ONNX_PROVIDER=cuda` runs those tests that need a GPU, where onnxruntime-gpu is installed.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import write_full_precision

from quant.format import Checkpoint, read_checkpoint
from quant.llama import CheckpointError
from runtime.engine.onnx import OnnxRunner
from runtime.engine.onnx_cache import HostSlotCache
from runtime.engine.onnx_provider import CPU, CUDA, TENSORRT, OnnxProviderError, Placement
from runtime.engine.reference import ReferenceRunner
from runtime.engine.registry import EngineOptions, load_engine, load_runner
from runtime.engine.runner import SequenceSlice

pytest.importorskip("onnx", reason="the extra onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

from quant.export_onnx import export_onnx  # noqa: E402

PROVIDER = os.environ.get("OSP_TEST_ONNX_PROVIDER", "cpu")
on_a_gpu = pytest.mark.skipif(PROVIDER == "cpu", reason="needs OSP_TEST_ONNX_PROVIDER=cuda, and a GPU")

IDS = np.random.default_rng(0).integers(0, 97, (16, 40)).astype(np.int32)


def slot(number: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array([number], np.int32)


def logits(runner: OnnxRunner, ids: Any, number: int = 0) -> Any:
    """Of a prompt in two pieces and three single tokens."""
    cuts = [0, 9, 20, 21, 22, 23]
    pieces = [SequenceSlice(ids[a:b], a, slot(number), b - a) for a, b in itertools.pairwise(cuts)]
    return np.concatenate([runner.step([piece]).rows() for piece in pieces])


def test_a_name_that_is_no_provider(quantized: Checkpoint) -> None:
    with pytest.raises(OnnxProviderError, match="no ONNX provider 'gpu'; there is: cpu, cuda, tensorrt"):
        OnnxRunner(quantized.path, provider="gpu")


@pytest.mark.skipif(CUDA in onnxruntime.get_available_providers(), reason="this onnxruntime has it")
@pytest.mark.parametrize(("provider", "missing"), [("cuda", CUDA), ("tensorrt", f"{TENSORRT} and no {CUDA}")])
def test_a_provider_that_this_onnxruntime_is_built_without(quantized: Checkpoint, provider: str, missing: str) -> None:
    with pytest.raises(OnnxProviderError) as caught:
        load_runner("onnx", quantized.path, EngineOptions(onnx_provider=provider))
    words = str(caught.value)
    assert f"has no {missing}, only " in words
    assert ", ".join(onnxruntime.get_available_providers()) in words
    assert "pip install 'onnxruntime-gpu[cuda,cudnn]'" in words


def test_a_provider_that_cannot_be_loaded(quantized: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime goes on with the CPU, and says so in its own log only: as onnxruntime-gpu does without CUDA."""
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda graph, options, **_: real(graph, options, providers=[CPU])
    )
    with pytest.raises(OnnxProviderError, match=f"could not load {CUDA}, and would go on with {CPU}"):
        OnnxRunner(quantized.path, provider="cuda")


def test_what_runs_is_said(quantized: Checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert load_runner("onnx", quantized.path, EngineOptions(threads=1)).info.kernel == CPU
    assert caplog.messages == [f"engine onnx: kernel {CPU}, 1 threads"]


@pytest.mark.skipif("AzureExecutionProvider" not in onnxruntime.get_available_providers(), reason="not in this build")
def test_nodes_that_a_provider_leaves_to_the_cpu_are_counted(
    quantized: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By a real second provider, which has no kernel of anything."""
    azure = "AzureExecutionProvider"
    monkeypatch.setattr("runtime.engine.onnx_provider.PROVIDERS", {"cpu": (CPU,), "azure": (azure, CPU)})
    monkeypatch.setattr("runtime.engine.onnx_provider.DEVICES", {"cpu": "cpu", "azure": "cpu"})
    monkeypatch.setattr("runtime.engine.onnx_session.DEVICES", {"cpu": "cpu", "azure": "cpu"})
    caplog.set_level(logging.INFO)
    runner = OnnxRunner(quantized.path, threads=1, provider="azure")
    warning, told = caplog.records
    assert warning.levelno == logging.WARNING
    kernel = runner.info.kernel
    counts = {name: int(count) for count, name in re.findall(r"(\d+) (\w+)", kernel)}
    assert warning.getMessage() == f"engine onnx: {sum(counts.values())} nodes run on the CPU, not on azure"
    assert kernel in told.getMessage()
    assert kernel.startswith(f"{azure}; {CPU}: ")
    assert counts["GroupQueryAttention"] >= quantized.config.num_hidden_layers
    np.testing.assert_array_equal(logits(runner, IDS[0]), logits(OnnxRunner(quantized.path, threads=1), IDS[0]))


def test_what_is_said_of_nodes() -> None:
    placed = Placement({CUDA: Counter({"MatMulNBits": 7}), CPU: Counter({"Gather": 1, "MatMulInteger": 3})})
    assert placed.described("cuda") == f"{CUDA}; {CPU}: 3 MatMulInteger, 1 Gather"
    assert placed.misplaced("cuda").total() == 4
    assert Placement({CPU: Counter({"Gather": 1})}).misplaced("cpu").total() == 0


def test_a_provider_is_of_no_use_to_other_engines(quantized: Checkpoint) -> None:
    for load in (load_engine, load_runner):
        with pytest.raises(OnnxProviderError, match="the ONNX provider 'cuda' is of no use to the engine reference"):
            load("reference", quantized.path, options=EngineOptions(onnx_provider="cuda"))


def test_a_graph_for_another_device(quantized: Checkpoint, tmp_path: Path) -> None:
    export_onnx(quantized.path, tmp_path / "out", "cuda")
    words = "its graph is for cuda, and the provider cpu computes graphs for cpu: .* --device cpu"
    with pytest.raises(CheckpointError, match=words):
        OnnxRunner(tmp_path / "out")


def test_the_graph_for_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its attention is in float16, that alone: 11 bits of each factor. Here on the CPU, on a GPU there."""
    root = write_full_precision(tmp_path / "model", ml_dtypes.bfloat16)
    expected_LV = ReferenceRunner(read_checkpoint(root)).step([SequenceSlice(IDS[0, :23], 0, np.arange(4), 23)]).rows()
    exact_LV = logits(OnnxRunner(root, threads=1), IDS[0])
    if PROVIDER == "cpu":
        for module in ("onnx_provider", "onnx_session"):
            monkeypatch.setattr(f"runtime.engine.{module}.DEVICES", {"cpu": "cuda"})
        monkeypatch.setattr("runtime.engine.onnx.DeviceSlotCache", HostSlotCache)
    given_LV = logits(OnnxRunner(root, threads=1, provider=PROVIDER), IDS[0])
    spread = np.abs(expected_LV).max()
    np.testing.assert_allclose(exact_LV, expected_LV, rtol=0, atol=1e-5 * spread)
    np.testing.assert_allclose(given_LV, expected_LV, rtol=0, atol=4e-3 * spread)
    assert np.abs(given_LV - expected_LV).max() > 1e-5 * spread  # it is in float16


def test_a_slot_is_copied_by_a_step(quantized: Checkpoint) -> None:
    """As on a device, where ONNX Runtime copies no part of a tensor."""
    runner = OnnxRunner(quantized.path, threads=1, num_slots=5, provider=PROVIDER)
    runner.step([SequenceSlice(IDS[0, :20], 0, slot(0), 0)])
    runner.copy_blocks([0], [1])
    for target in (4, 2):
        runner._copy_by_step(0, target)
    for position in (20, 21):
        piece = IDS[0, position : position + 1]
        rows = [runner.step([SequenceSlice(piece, position, slot(number))]).rows() for number in (0, 1, 4, 2)]
        for row in rows[1:]:
            np.testing.assert_array_equal(row, rows[0])


@on_a_gpu
def test_a_gpu_runs_it(quantized: Checkpoint) -> None:
    assert OnnxRunner(quantized.path, provider="cuda").info.kernel.startswith(CUDA)


@on_a_gpu
def test_ragged_rows_on_a_gpu(quantized: Checkpoint) -> None:
    """Sixteen rows of unlike lengths that decode together: each is the row alone, but for attention in float16."""
    runner = OnnxRunner(quantized.path, num_slots=17, provider="cuda")
    for i in range(16):
        runner.step([SequenceSlice(IDS[i, : 3 + i], 0, slot(i), 0)])
    together = runner.step([SequenceSlice(IDS[i, 3 + i : 4 + i], 3 + i, slot(i)) for i in range(16)]).rows()
    for i in range(16):
        alone = runner.step([SequenceSlice(IDS[i, 3 + i : 4 + i], 3 + i, slot(i))]).rows()[0]
        np.testing.assert_allclose(together[i], alone, rtol=0, atol=1e-2)
