"""Writes a checkpoint as an ONNX model for ONNX Runtime: `osp export --format onnx`. No torch.

What lies in the directory stands in `quant.onnx_directory`, what the graph takes and gives in `quant.onnx_llama`.
"""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from quant.directories import appearing_whole, copy_companions
from quant.files import read_json, write_json
from quant.format import CheckpointReader
from quant.llama import CheckpointError
from quant.onnx_directory import CACHE_TYPES, EXPORT_VERSION, FORMAT, export_record, obstacle
from quant.onnx_llama import build_graph


def export_onnx(source: str | os.PathLike[str], out: str | os.PathLike[str], device: str = "cpu") -> dict[str, Any]:
    """Writes the checkpoint at `source`, of any scheme or in full precision, into the directory `out`, which appears
    whole or not at all.

    Args:
        device: what it is for, one of `CACHE_TYPES`.

    Returns:
        What was written: format, precision, device, bytes of weights, and notes, which are sentences.

    Raises:
        CheckpointError: `source` is not a usable checkpoint, or is one that ONNX Runtime cannot compute.
        FileExistsError: `out` exists and is not an empty directory.
        OSError: `out` cannot be made.
    """
    reader = CheckpointReader(source)
    require_exportable(reader)
    with appearing_whole(Path(out)) as partial:
        copy_companions(reader.path, partial)
        write_json(partial / "config.json", read_json(reader.path, "config.json", ""))
        weight_bytes = write_graph(reader, partial, device)
        export = export_record(partial, precision_of(reader), device)
        write_json(
            partial / "osp.json", {**reader.provenance, "tool_version": version("osp-runtime"), "export": export}
        )
    return {
        "format": FORMAT,
        "precision": precision_of(reader),
        "device": device,
        "bytes": weight_bytes,
        "notes": _notes(reader, device),
    }


def require_exportable(reader: CheckpointReader) -> None:
    """Raises `CheckpointError` where ONNX Runtime's attention does not take the model's shape."""
    if reason := obstacle(reader.config):
        raise CheckpointError(reader.path, f"{reason}; run it with the native engine")


def write_graph(reader: CheckpointReader, directory: Path, device: str) -> int:
    """Writes the two files of the graph into a directory; returns the bytes of its weights.

    Args:
        device: what it is for, one of `CACHE_TYPES`.

    Raises:
        CheckpointError: a value in the checkpoint is not finite, or is none that a quantizer writes.
    """
    graph = build_graph(reader, device)
    metadata = {
        "osp_export_version": str(EXPORT_VERSION),
        "osp_precision": precision_of(reader),
        "osp.json": json.dumps(reader.provenance),
    }
    graph.write(directory, metadata)
    return graph.weight_bytes


def precision_of(reader: CheckpointReader) -> str:
    """As `Checkpoint.precision`."""
    return reader.scheme.label if reader.scheme else str(reader.norm("model.norm.weight").dtype)


def _notes(reader: CheckpointReader, device: str) -> list[str]:
    """What takes more memory than in the checkpoint, a sentence each."""
    notes = []
    if reader.scheme is None:
        notes.append("weights become float32: ONNX Runtime's products of floats on CPUs know no bfloat16")
    elif reader.scheme.kv_bits < 16:
        held = CACHE_TYPES[device].__name__
        notes.append(
            f"keys and values are rounded to {reader.scheme.kv_bits} bits as the scheme says, and held in {held}"
        )
    return notes
