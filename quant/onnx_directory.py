"""A directory that `osp export --format onnx` made: its files, and whether they still are what was written. No onnx.

config.json       the source's: the model's shape, and the scheme
model.onnx        the graph, see `quant.onnx_llama`
model.onnx.data   its weights
tokenizer.json    and what else lies beside a checkpoint's weights
osp.json          the source's; `export` has format, version, precision, the device that the graph is for, and the
                  SHA-256 of its two files
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import numpy as np

from quant.files import sha256
from quant.format import read_config, read_provenance
from quant.llama import CheckpointError, LlamaConfig
from quant.tokenizer import check_tokenizer

FORMAT = "onnx"

GRAPH_FILE, WEIGHTS_FILE = "model.onnx", "model.onnx.data"

EXPORT_VERSION = 1
"""Of the graph's inputs and outputs; another is refused."""


CACHE_TYPES: dict[str, type[np.generic]] = {"cpu": np.float32, "cuda": np.float16}
"""The devices that a graph can be for, and what attention is computed in there, and keys and values are held in."""

HEAD_MULTIPLE = 8
"""The attention of ONNX Runtime takes heads of no other width."""


@dataclass(frozen=True, slots=True)
class Export:
    """What is in an exported directory.

    Attributes:
        precision: as `Checkpoint.precision`.
        device: which of `CACHE_TYPES` the graph is for.
    """

    config: LlamaConfig
    precision: str
    device: str


def obstacle(config: LlamaConfig) -> str | None:
    """Why ONNX Runtime cannot compute a model of this shape; None: it can."""
    if config.head_dim % HEAD_MULTIPLE:
        return f"its heads have a width of {config.head_dim}, and ONNX Runtime takes multiples of {HEAD_MULTIPLE}"
    return None


def is_exported(root: Path) -> bool:
    """Whether a directory has a graph, from wherever it may be."""
    return os.path.lexists(root / GRAPH_FILE)


def export_record(root: Path, precision: str, device: str) -> dict[str, Any]:
    """The entry `export` of osp.json, of the files that lie in `root`."""
    hashes = {name: sha256(root / name) for name in (GRAPH_FILE, WEIGHTS_FILE)}
    return {
        "format": FORMAT,
        "version": EXPORT_VERSION,
        "precision": precision,
        "device": device,
        "sha256": hashes,
    }


def read_export(root: Path) -> Export:
    """What an exported model is, all of whose files are as they were written.

    Raises:
        CheckpointError: the graph is not ours, or of another version; a file is missing, or is another than recorded.
    """
    config, _ = read_config(root)
    provenance = read_provenance(root)
    export = provenance.get("export")
    if not isinstance(export, dict) or export.get("format") != FORMAT:
        raise CheckpointError(
            root, f"{GRAPH_FILE} was not made by `osp export --format {FORMAT}`: osp.json says nothing of it"
        )
    if export.get("version") != EXPORT_VERSION:
        raise CheckpointError(
            root,
            f"{GRAPH_FILE} is of export version {shortened(export.get('version'))}; this release knows version "
            f"{EXPORT_VERSION}: export the checkpoint again",
        )
    check_tokenizer(root, config, provenance)
    recorded = export.get("sha256")
    for name in (GRAPH_FILE, WEIGHTS_FILE):
        if not os.path.isfile(root / name):
            raise CheckpointError(root, f"{name} is missing; export the checkpoint again")
        _check_hash(root, name, recorded.get(name) if isinstance(recorded, dict) else None)
    return Export(config, str(export.get("precision")), str(export.get("device", "cpu")))


def _check_hash(root: Path, name: str, recorded: Any) -> None:
    actual = sha256(root / name)
    if recorded != actual:
        raise CheckpointError(
            root,
            f"{name} is not the file that was exported: its SHA-256 is {actual[:12]}…, osp.json records "
            f"{str(recorded)[:12]}…; export the checkpoint again",
        )
