"""What `--engine auto` takes: vLLM where there is a GPU, else the native engine, ONNX Runtime, or the reference."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from quant.format import read_config
from quant.onnx_directory import is_exported, obstacle
from runtime.engine.native_library import NativeLibraryError, load_library
from runtime.engine.vllm_arguments import SERIES

log = logging.getLogger(__name__)

ONNX_PACKAGES = {"onnxruntime": ("onnxruntime", "onnxruntime-gpu"), "onnx": ("onnx",)}
"""What the ONNX engine imports, and the distributions that bring it."""


def choose_engine(path: Path, *, bare: bool = False) -> str:
    """The engine that runs the checkpoint or exported directory `path`; one line of the log says which, and why.

    Args:
        bare: only those that are a `ModelRunner`; vLLM is none.

    Raises:
        CheckpointError: `path` has no usable config.json, and the choice hangs on it.
    """
    if is_exported(path):
        log.info("engine auto: onnx runs %s, which is an exported graph", path)
        return "onnx"
    obstacles: dict[str, Callable[[], str | None]] = {"native": _native_missing, "onnx": lambda: _onnx_missing(path)}
    if not bare:
        obstacles = {"vllm": _vllm_missing} | obstacles
    reasons: list[str] = []
    for name, missing in obstacles.items():
        if (reason := missing()) is None:
            log.info("engine auto: %s runs %s%s", name, path, "".join(f"; {reason}" for reason in reasons))
            return name
        reasons.append(f"not {name}: {reason}")
    log.warning("engine auto: the slow reference engine runs %s; %s", path, "; ".join(reasons))
    return "reference"


def _vllm_missing() -> str | None:
    if not any(_is_installed(distribution) for distribution in SERIES):
        return "it is not installed"
    return None if _cuda_devices() else "it has no CUDA device here"


def _native_missing() -> str | None:
    try:
        load_library()
    except NativeLibraryError as error:
        return str(error)
    return None


def _onnx_missing(path: Path) -> str | None:
    for package, distributions in ONNX_PACKAGES.items():
        if not any(_is_installed(distribution) for distribution in distributions):
            return f"{package} is not installed"
    return obstacle(read_config(path)[0])


def _is_installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


def _cuda_devices() -> int:
    """Asked of the driver, for torch takes seconds to import."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value
