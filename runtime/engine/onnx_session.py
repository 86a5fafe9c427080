"""From a directory to a session of ONNX Runtime: an exported model is verified, a checkpoint is exported on the spot.

onnxruntime is imported when a session is opened, and not before; onnx only where a graph has to be built.
"""

from __future__ import annotations

import importlib
import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.format import CheckpointReader
from quant.llama import CheckpointError, LlamaConfig
from quant.onnx_directory import GRAPH_FILE, is_exported, read_export
from runtime.engine.onnx_provider import DEVICES, OnnxProviderError, open_session, placement, require_provider

SPIN_US = 50
"""How long a thread spins while it waits for others, before it sleeps: about the time of a node."""

SPIN_TIME_SINCE = (1, 26)
"""The first version of ONNX Runtime that can be told; those before spin for long or not at all."""

log = logging.getLogger(__name__)


class OnnxUnavailableError(ImportError):
    """There is no ONNX Runtime here, or nothing to build its graph with; the message says what to install."""


@dataclass(frozen=True, slots=True)
class OnnxModel:
    """A session, and what it computes.

    Attributes:
        config: the model's shape.
        precision: as `Checkpoint.precision`.
        device: where it runs, one of `CACHE_TYPES`.
        kernel: as `EngineInfo.kernel`: the provider, and which nodes it has not.
    """

    session: Any
    config: LlamaConfig
    precision: str
    device: str
    kernel: str


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


def open_model(path: str | os.PathLike[str], threads: int, provider: str = "cpu") -> OnnxModel:
    """The model in a directory that `osp export --format onnx` made, or in a checkpoint directory.

    The graph of a checkpoint goes through a temporary directory, which is gone when this returns. The log says what
    runs it.

    Args:
        threads: 0 for as many as the process may use.
        provider: one of `onnx_provider.PROVIDERS`.

    Raises:
        OnnxUnavailableError: a package is missing.
        OnnxProviderError: the provider is not in the installed onnxruntime, or cannot be loaded.
        CheckpointError: the directory is neither, or its files are not those that were exported.
    """
    root = Path(path)
    exported = is_exported(root)
    require_onnxruntime(building=not exported)
    require_provider(provider)
    device = DEVICES[provider]
    if exported:
        export = read_export(root)
        if export.device != device:
            raise CheckpointError(
                root,
                f"its graph is for {export.device}, and the provider {provider} computes graphs for {device}: export "
                f"the checkpoint again with --device {device}",
            )
        return _opened(root, root, threads, provider, export.config, export.precision)
    # It needs onnx, which to run an exported model does not.
    from quant.export_onnx import precision_of, require_exportable, write_graph

    reader = CheckpointReader(root)
    require_exportable(reader)
    with tempfile.TemporaryDirectory(prefix="osp-onnx-") as directory:
        write_graph(reader, Path(directory), device)
        return _opened(Path(directory), root, threads, provider, reader.config, precision_of(reader))


def _opened(directory: Path, root: Path, threads: int, provider: str, config: LlamaConfig, precision: str) -> OnnxModel:
    session = _session(directory, root, threads, provider)
    placed = placement(session)
    if misplaced := placed.misplaced(provider):
        log.warning("engine onnx: %d nodes run on the CPU, not on %s", misplaced.total(), provider)
    kernel = placed.described(provider)
    log.info("engine onnx: kernel %s, %d threads", kernel, session.get_session_options().intra_op_num_threads)
    return OnnxModel(session, config, precision, DEVICES[provider], kernel)


def _waiting(version: str) -> dict[str, str]:
    """How a thread waits for the others at the end of each node, as entries of `session.intra_op`.

    Where others use the same cores, a thread that spins takes one from whom it waits for; where nobody does, sleeping
    and waking takes longer than a node (docs/onnx.md).
    """
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) < SPIN_TIME_SINCE:
        return {"allow_spinning": "0"}
    return {"allow_spinning": "1", "spin_duration_us": str(SPIN_US)}


def _session(directory: Path, root: Path, threads: int, provider: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    options.inter_op_num_threads = 1
    for name, value in _waiting(onnxruntime.__version__).items():
        options.add_session_config_entry(f"session.intra_op.{name}", value)
    options.log_severity_level = 3
    try:
        return open_session(directory / GRAPH_FILE, provider, options)
    except OnnxProviderError:
        raise
    except Exception as error:  # the library's errors have no class of their own
        if provider != "cpu":
            raise OnnxProviderError(
                f"{root}: ONNX Runtime {onnxruntime.__version__} cannot load the graph on {provider}: {error}"
            ) from error
        raise CheckpointError(root, f"ONNX Runtime {onnxruntime.__version__} cannot load the graph: {error}") from error
