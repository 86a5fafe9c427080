"""From a directory to a session of ONNX Runtime: an exported model is verified, a checkpoint is exported on the spot.

onnxruntime is imported when a session is opened, and not before; onnx only where a graph has to be built.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.format import CheckpointReader
from quant.llama import CheckpointError, LlamaConfig
from quant.onnx_directory import GRAPH_FILE, is_exported, read_export


class OnnxUnavailableError(ImportError):
    """There is no ONNX Runtime here, or nothing to build its graph with; the message says what to install."""


@dataclass(frozen=True, slots=True)
class OnnxModel:
    """A session, and what it computes: the model's shape and its precision, as `Checkpoint.precision`."""

    session: Any
    config: LlamaConfig
    precision: str


def require_onnxruntime(building: bool = False) -> None:
    """Raises `OnnxUnavailableError` where onnxruntime is missing or, for `building`, onnx."""
    for module in ("onnxruntime", *(["onnx"] if building else [])):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise OnnxUnavailableError(
                f"the ONNX engine needs the package {module} ({error}): pip install 'osp-runtime[onnx]', or choose "
                "another engine with --engine"
            ) from error


def open_model(path: str | os.PathLike[str], threads: int) -> OnnxModel:
    """The model in a directory that `osp export --format onnx` made, or in a checkpoint directory.

    The graph of a checkpoint goes through a temporary directory, which is gone when this returns.

    Raises:
        OnnxUnavailableError: a package is missing.
        CheckpointError: the directory is neither, or its files are not those that were exported.
    """
    root = Path(path)
    exported = is_exported(root)
    require_onnxruntime(building=not exported)
    if exported:
        config, precision = read_export(root)
        return OnnxModel(_session(root, root, threads), config, precision)
    # It needs onnx, which to run an exported model does not.
    from quant.export_onnx import precision_of, require_exportable, write_graph

    reader = CheckpointReader(root)
    require_exportable(reader)
    with tempfile.TemporaryDirectory(prefix="osp-onnx-") as directory:
        write_graph(reader, Path(directory), "float32")
        return OnnxModel(_session(Path(directory), root, threads), reader.config, precision_of(reader))


def _session(directory: Path, root: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(directory / GRAPH_FILE, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library's errors have no class of their own
        raise CheckpointError(root, f"ONNX Runtime {onnxruntime.__version__} cannot load the graph: {error}") from error
