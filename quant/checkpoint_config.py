"""What a checkpoint says of itself: config.json has the model's shape and the scheme, osp.json where it comes from."""

from __future__ import annotations

import os
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from quant.files import read_json
from quant.llama import CheckpointError, LlamaConfig
from quant.scheme import Scheme, SchemeError

FORMAT_VERSION = 2
"""Of the quantized form (`quant.format`)."""


def read_config(root: Path) -> tuple[LlamaConfig, dict[str, Any] | None]:
    """The model's shape and the `quantization_config` of config.json (None where there is none)."""
    if not os.path.isdir(root):
        raise CheckpointError(root, "no such directory; a checkpoint is a directory with config.json in it")
    config_json = read_json(root, "config.json", "this is not a checkpoint directory")
    quantization = config_json.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise CheckpointError(root, f"config.json: quantization_config must be an object, is {shortened(quantization)}")
    return LlamaConfig.from_json(root, config_json), quantization


def read_provenance(root: Path) -> dict[str, Any]:
    """The content of osp.json; {} where the checkpoint has none."""
    return read_json(root, "osp.json", "") if os.path.lexists(root / "osp.json") else {}


def read_scheme(root: Path, config: LlamaConfig, quantization: dict[str, Any] | None) -> Scheme | None:
    """The scheme in the `quantization_config` of config.json; None for full precision."""
    if quantization is None:
        return None
    method, version = quantization.get("quant_method"), quantization.get("format_version")
    if method != "osp":
        raise CheckpointError(root, f"quantized by {shortened(method)}; this reader knows 'osp' and full precision")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            root,
            f"quantized format version {shortened(version)}; this reader knows version {FORMAT_VERSION}: quantize the "
            "model again",
        )
    content = quantization.get("scheme")
    if not isinstance(content, dict):
        raise CheckpointError(root, f"config.json: the scheme must be an object, is {shortened(content)}")
    try:
        scheme = Scheme.from_dict(content)
        config.check_scheme(scheme)
    except SchemeError as error:
        raise CheckpointError(root, str(error)) from None
    return scheme
