"""Reads and writes checkpoints: Hugging Face Llama in 16 or 32 bit, and the quantized form. No torch.

A checkpoint is a directory:

    config.json          Hugging Face Llama; a quantized one has `quantization_config.quant_method = "osp"`
    model.safetensors    one file, or shards with `model.safetensors.index.json`; a quantized one has osp.safetensors
    tokenizer.json       its SHA-256 stands in osp.json
    osp.json             where the checkpoint comes from and what was measured (optional for foreign models)

A module `P` with a weight is one tensor `P.weight` (bfloat16, float16 or float32, [M, K]), or, quantized:

    P.weight_packed  uint8   [M, ceil(K / 2)]   4 bits: two codes a byte, low nibble first (`arithmetic.pack`)
    P.weight_codes   int8    [M, K]             8 bits
    P.weight_scale   float32 [1] or [M]         one, or one an output channel; bfloat16-representable
    P.input_scale    float32 [1]                where the input has a static scale; bfloat16-representable. One value
                                                for q, k and v of a layer, and one for gate and up

The embedding has a scale a row. A tied model has no tensors of its own for the head. Where the scheme says so, the
weight of down_proj is rotated: its input passes `Hadamard.of_width(K)` before it is quantized.

Loading is strict: every tensor is consumed and every parameter is set, or `CheckpointError` names what is wrong. Two
kinds of tensors repeat what is known and are dropped, as in transformers: `*.rotary_emb.inv_freq`, which files of
Llama 1 and 2 hold, and the `lm_head.weight` of a tied model, if it is the embedding bit for bit.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from quant.checkpoint_config import FORMAT_VERSION, read_config, read_provenance
from quant.checkpoint_reader import CheckpointReader
from quant.files import sha256, write_json
from quant.llama import EMBEDDING, HEAD, LlamaConfig
from quant.scheme import Scheme
from quant.tensors import (
    INDEX_FILE,
    QUANTIZED_WEIGHTS_FILE,
    WEIGHTS_FILE,
    Tensor,
)
from quant.tokenizer import check_tokenizer, read_tokenizer
from quant.weights import QuantizedLinear, QuantizedWeight, stored_tensors

__all__ = [
    "EMBEDDING",
    "FORMAT_VERSION",
    "HEAD",
    "INDEX_FILE",
    "QUANTIZED_WEIGHTS_FILE",
    "WEIGHTS_FILE",
    "Checkpoint",
    "CheckpointReader",
    "QuantizedLinear",
    "QuantizedWeight",
    "Tensor",
    "check_tokenizer",
    "read_checkpoint",
    "read_config",
    "read_provenance",
    "read_tokenizer",
    "sha256",
    "stored_tensors",
    "write_json",
    "write_quantized",
]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A validated checkpoint in memory.

    Attributes:
        path: the directory that it was read from.
        config: the model's shape.
        scheme: None for full precision.
        linears: the body's linear layers by module name ("model.layers.0.self_attn.q_proj"), each a float array
            [M, K] as stored, or a `QuantizedLinear`.
        embedding: [V, D], as stored, or quantized with a scale a row.
        head: [V, D], as stored, or quantized; a tied head shares its codes with the embedding.
        norms: the norm weights [D] by full name ("model.norm.weight"), as stored.
        provenance: the content of osp.json, or {}.
    """

    path: Path
    config: LlamaConfig
    scheme: Scheme | None
    linears: dict[str, Tensor | QuantizedLinear]
    embedding: Tensor | QuantizedWeight
    head: Tensor | QuantizedLinear
    norms: dict[str, Tensor]
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def precision(self) -> str:
        """The scheme's label ("w4a4"), or the stored float type ("bfloat16")."""
        return self.scheme.label if self.scheme else str(self.norms["model.norm.weight"].dtype)


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads and validates a whole checkpoint directory.

    Raises:
        CheckpointError: the directory is no checkpoint, a file is missing or truncated, a tensor is missing,
            unexpected, of the wrong shape or type or not finite, or the tokenizer does not fit the model.
    """
    reader = CheckpointReader(path)
    return Checkpoint(
        reader.path,
        reader.config,
        reader.scheme,
        {name: reader.linear(name) for name in reader.config.linear_shapes()},
        reader.embedding(),
        reader.head(),
        {name: reader.norm(name) for name in reader.config.norm_names()},
        reader.provenance,
    )


def write_quantized(
    root: Path,
    config_json: Mapping[str, Any],
    scheme: Scheme,
    tensors: Mapping[str, Tensor],
    provenance: Mapping[str, Any],
) -> None:
    """Writes the config, weights and osp.json of a quantized checkpoint into `root`, which must exist.

    Args:
        config_json: the source model's config.json; `tie_word_embeddings` must fit `tensors`.
        tensors: of every module, as `stored_tensors` makes them (a norm's module name is its own without ".weight").
    """
    quantization = {"quant_method": "osp", "format_version": FORMAT_VERSION, "scheme": scheme.to_dict()}
    # transformers 4 wrote torch_dtype for what is now dtype.
    config_json = {key: value for key, value in config_json.items() if key != "torch_dtype"}
    write_json(root / "config.json", {**config_json, "quantization_config": quantization, "dtype": "bfloat16"})
    write_json(root / "osp.json", provenance)
    save_file(dict(tensors), root / QUANTIZED_WEIGHTS_FILE, metadata={"format": "pt"})
    # safetensors lets only the owner read its files; a server often runs as another user.
    shutil.copymode(root / "config.json", root / QUANTIZED_WEIGHTS_FILE)
