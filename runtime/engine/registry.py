"""From a name on the command line to an engine that runs a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quant.format import read_checkpoint
from runtime.engine.base import Engine
from runtime.engine.choice import choose_engine
from runtime.engine.local import LocalEngine
from runtime.engine.native import NativeRunner
from runtime.engine.onnx import OnnxRunner
from runtime.engine.onnx_provider import OnnxProviderError
from runtime.engine.reference import ReferenceRunner
from runtime.engine.runner import ModelRunner
from runtime.engine.scheduler import SchedulerLimits
from runtime.engine.vllm_arguments import VllmArgumentError

log = logging.getLogger(__name__)

ENGINES = ("auto", "native", "onnx", "reference", "vllm")
"""The names that `load_engine` knows; `auto` chooses among the others."""

VLLM = "vllm"
RUNNERS = tuple(name for name in ENGINES if name != VLLM)
"""Those that are a `ModelRunner`, and that `load_runner` knows."""


class UnknownEngineError(ValueError):
    """This release has no engine of that name for what is asked of it; the message lists those it has."""

    def __init__(self, name: str, known: Sequence[str] = ENGINES) -> None:
        super().__init__(f"this release has no engine {name!r}; it has: {', '.join(known)}")


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How to run an engine.

    Attributes:
        threads: 0 for as many as the process may use. The reference engine has no use for it.
        kernel: of the native engine: one of `osp bench kernel`'s; empty for the best that the processor runs.
        onnx_provider: of the ONNX engine: what its graph runs on, one of `onnx_provider.PROVIDERS`; no other engine has
            use for any but the CPU.
        stream_interval_s: least seconds between two deliveries of tokens, see `runtime.engine.stream.Mailroom`.
        vllm: vLLM's engine arguments by name, see `runtime.engine.vllm_arguments`; no other engine has use for them.
    """

    threads: int = 0
    kernel: str = ""
    stream_interval_s: float = 0.0
    onnx_provider: str = "cpu"
    vllm: Mapping[str, Any] = field(default_factory=dict)


def load_engine(
    name: str, path: Path, limits: SchedulerLimits | None = None, options: EngineOptions | None = None
) -> Engine:
    """Starts the engine called `name` on the checkpoint directory `path`.

    Raises:
        UnknownEngineError: no such engine; raised before anything is read.
        NativeLibraryError: the native engine is asked for by name, and is not built.
        OnnxUnavailableError: the ONNX engine is asked for by name, and its packages are not installed.
        OnnxProviderError: the options name a provider of ONNX Runtime that does not run here, or that is of no use.
        CheckpointError: `path` is not a usable checkpoint.
        KernelError: the options name a kernel that this processor does not run.
        VllmUnavailableError, VllmArgumentError, EngineDeadError: see `VllmEngine`.
    """
    if name not in ENGINES:
        raise UnknownEngineError(name)
    options = options or EngineOptions()
    if name == "auto":
        name = choose_engine(path)
    check_provider(name, options)
    if name == VLLM:
        from runtime.engine.vllm import VllmEngine

        return VllmEngine(path, limits, options.stream_interval_s, options.vllm)
    if options.vllm:
        raise VllmArgumentError(f"arguments for vLLM are of no use to the engine {name}; choose --engine vllm")
    return LocalEngine(load_runner(name, path, options), limits, options.stream_interval_s)


def load_runner(name: str, path: Path, options: EngineOptions | None = None) -> ModelRunner:
    """The bare `ModelRunner` of the engine called `name`, for work without a scheduler; errors as `load_engine`.

    vLLM has none: it is an engine only with its own scheduler.
    """
    if name not in RUNNERS:
        raise UnknownEngineError(name, RUNNERS)
    options = options or EngineOptions()
    if name == "auto":
        name = choose_engine(path, bare=True)
    check_provider(name, options)
    if name == "reference":
        return ReferenceRunner(read_checkpoint(path))
    if name == "onnx":
        return OnnxRunner(path, threads=options.threads, provider=options.onnx_provider)
    runner = NativeRunner(path, threads=options.threads, kernel=options.kernel)
    log.info("native engine: kernel %s, %d threads", runner.kernel, runner.threads)
    return runner


def check_provider(name: str, options: EngineOptions) -> None:
    """Raises `OnnxProviderError` where the options name a provider, and the engine is not ONNX Runtime."""
    if name != "onnx" and options.onnx_provider != "cpu":
        raise OnnxProviderError(
            f"the ONNX provider {options.onnx_provider!r} is of no use to the engine {name}; choose --engine onnx"
        )
