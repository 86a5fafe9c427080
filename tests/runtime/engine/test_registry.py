"""From a name to an engine."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from quant.format import Checkpoint
from quant.llama import CheckpointError
from runtime.engine.base import GenerationRequest, SamplingParams
from runtime.engine.choice import choose_engine
from runtime.engine.native_library import NativeLibraryError
from runtime.engine.registry import EngineOptions, UnknownEngineError, load_engine, load_runner
from runtime.engine.scheduler import SchedulerLimits
from runtime.engine.vllm_arguments import VllmArgumentError, VllmUnavailableError


@pytest.mark.parametrize("name", ["tensorrt", "referense", ""])
def test_an_engine_that_this_release_lacks(name: str) -> None:
    for load in (load_engine, load_runner):
        with pytest.raises(UnknownEngineError, match=f"no engine '{name}'; it has: auto, native, onnx, reference"):
            load(name, Path("nowhere"))


def test_vllm_is_not_imported_and_says_what_to_install(tmp_path: Path) -> None:
    """Where it is not installed, that is; tests/on_vllm has the rest."""
    if find_spec("vllm") is not None:
        pytest.skip("vLLM is installed here")
    with pytest.raises(VllmUnavailableError, match=r"pip install 'osp-runtime\[vllm\]'"):
        load_engine("vllm", tmp_path)
    with pytest.raises(UnknownEngineError, match=r"no engine 'vllm'; it has: auto, native, onnx, reference$"):
        load_runner("vllm", tmp_path)


def test_arguments_for_vllm_belong_to_vllm(quantized: Checkpoint) -> None:
    with pytest.raises(VllmArgumentError, match="of no use to the engine reference"):
        load_engine("reference", quantized.path, options=EngineOptions(vllm={"max_num_seqs": 4}))


def test_a_directory_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load_engine("reference", tmp_path)


def test_auto_says_what_it_chose(quantized: Checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    chosen = load_runner("auto", quantized.path).info.engine
    assert chosen in ("native", "onnx", "reference")
    assert f"{chosen} " in caplog.messages[0]


def test_auto_without_the_native_engine(
    quantized: Checkpoint, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    caplog.set_level(logging.INFO)
    monkeypatch.setitem(sys.modules, "runtime.native._osp", None)  # as if it were not there
    assert load_runner("auto", quantized.path).info.engine == "onnx"
    message, kernel = caplog.messages
    assert "CPUExecutionProvider" in kernel
    assert message.startswith(f"engine auto: onnx runs {quantized.path}; not native: ")
    with pytest.raises(NativeLibraryError, match="not built on this machine"):
        load_runner("native", quantized.path)


def test_auto_takes_the_reference_engine_where_there_is_no_other(
    quantized: Checkpoint, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "runtime.native._osp", None)
    monkeypatch.setattr("runtime.engine.choice._is_installed", lambda distribution: False)
    assert load_runner("auto", quantized.path).info.engine == "reference"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "the slow reference engine runs" in record.message
    assert "not onnx: onnxruntime is not installed" in record.message


@pytest.mark.parametrize(("devices", "chosen"), [(1, "vllm"), (0, "native")])
def test_auto_takes_vllm_on_a_gpu(
    quantized: Checkpoint,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    devices: int,
    chosen: str,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("runtime.engine.choice._is_installed", lambda distribution: True)
    monkeypatch.setattr("runtime.engine.choice._cuda_devices", lambda: devices)
    monkeypatch.setattr("runtime.engine.choice.load_library", lambda: None)
    assert choose_engine(quantized.path) == chosen
    assert choose_engine(quantized.path, bare=True) == "native"
    assert caplog.messages[0].startswith(f"engine auto: {chosen} runs")


def test_the_engine_generates(quantized: Checkpoint) -> None:
    async def main() -> int:
        engine = load_engine("reference", quantized.path, SchedulerLimits(max_sequences=2))
        wanted = GenerationRequest("a", (1, 2), SamplingParams(max_tokens=4))
        count = len([chunk async for chunk in engine.generate(wanted)])
        await engine.shutdown(1)
        return count

    assert asyncio.run(main()) == 4


def test_torch_is_not_imported() -> None:
    check = "import sys, runtime.engine.registry, runtime.model_cli; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
