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
from reprlib import repr as shortened
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from quant import arithmetic
from quant.files import read_json, sha256, write_json
from quant.llama import EMBEDDING, HEAD, CheckpointError, LlamaConfig
from quant.scheme import LINEAR_SITES, SHARED_INPUTS, LinearScheme, Scheme, SchemeError
from quant.tensors import (
    FLOAT_DTYPES,
    INDEX_FILE,
    QUANTIZED_WEIGHTS_FILE,
    WEIGHTS_FILE,
    StoredTensor,
    Tensor,
    open_tensors,
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

FORMAT_VERSION = 2
ROTARY_BUFFER = ".rotary_emb.inv_freq"


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


class CheckpointReader:
    """A checkpoint directory of which each tensor is read, and checked, when it is asked for.

    Opening it checks all that can be known without reading weights: config, scheme, tokenizer, the names, shapes and
    types of all tensors.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises `CheckpointError` as `read_checkpoint` does."""
        self.path = Path(path)
        self.config, quantization = read_config(self.path)
        self.scheme = _read_scheme(self.path, self.config, quantization)
        self.provenance = read_provenance(self.path)
        check_tokenizer(self.path, self.config, self.provenance)
        tensors = open_tensors(self.path)
        unclaimed = {name: tensor for name, tensor in tensors.items() if not name.endswith(ROTARY_BUFFER)}
        self._tensors = {
            name: _claim(unclaimed, self.path, name, *wanted) for name, wanted in self._expected_tensors().items()
        }
        if self.config.tie_word_embeddings:
            self._drop_tied_head(unclaimed)
        if unclaimed:
            raise CheckpointError(
                self.path,
                f"unexpected tensors: {_listed(unclaimed)}; {self.config.describe()} has no such parameters",
            )
        self._check_shared_inputs()

    def linear(self, name: str) -> Tensor | QuantizedLinear:
        """The linear layer called `name` ("model.layers.0.mlp.down_proj", or "lm_head" where it is not tied).

        Raises:
            CheckpointError: a value in it is not finite, or is none that a quantizer writes.
        """
        linear = self._linear_scheme(name)
        if linear.weight_bits == 16:
            return self._read_float(f"{name}.weight")
        rotated = name.endswith("down_proj") and self.scheme is not None and self.scheme.hadamard != "none"
        scale = self._read_scale(f"{name}.input_scale")[0] if linear.static else None
        return QuantizedLinear(self._read_weight(name, linear.weight_bits), linear.activation_bits, scale, rotated)

    def embedding(self) -> Tensor | QuantizedWeight:
        """The embedding; errors as `linear`."""
        bits = self.scheme.embedding_bits if self.scheme else 16
        return self._read_float(f"{EMBEDDING}.weight") if bits == 16 else self._read_weight(EMBEDDING, bits)

    def head(self) -> Tensor | QuantizedLinear:
        """The head, tied or not; errors as `linear`."""
        if not self.config.tie_word_embeddings:
            return self.linear(HEAD)
        table = self.embedding()
        if isinstance(table, QuantizedWeight):
            return QuantizedLinear(table, self._linear_scheme(HEAD).activation_bits)
        return table

    def norm(self, name: str) -> Tensor:
        """The norm weight called `name` ("model.norm.weight"); errors as `linear`."""
        return self._read_float(name)

    def _linear_scheme(self, name: str) -> LinearScheme:
        return self.scheme.linear(name) if self.scheme else LinearScheme()

    def _expected_tensors(self) -> dict[str, tuple[tuple[int, ...], tuple[np.dtype[Any], ...]]]:
        """Name -> (shape, allowed types) of every tensor that this model has in this scheme."""
        expected: dict[str, tuple[tuple[int, ...], tuple[np.dtype[Any], ...]]] = {}
        float32 = (np.dtype(np.float32),)
        for name, (rows, columns) in (self.config.linear_shapes() | self.config.table_shapes()).items():
            if name == EMBEDDING:
                bits, per_row, static = self.scheme.embedding_bits if self.scheme else 16, True, False
            else:
                linear = self._linear_scheme(name)
                bits, per_row, static = linear.weight_bits, linear.weight_granularity == "channel", linear.static
            if bits == 16:
                expected[f"{name}.weight"] = (rows, columns), FLOAT_DTYPES
                continue
            if bits == 4:
                expected[f"{name}.weight_packed"] = (rows, (columns + 1) // 2), (np.dtype(np.uint8),)
            else:
                expected[f"{name}.weight_codes"] = (rows, columns), (np.dtype(np.int8),)
            expected[f"{name}.weight_scale"] = (rows if per_row else 1,), float32
            if static:
                expected[f"{name}.input_scale"] = (1,), float32
        return expected | dict.fromkeys(self.config.norm_names(), ((self.config.hidden_size,), FLOAT_DTYPES))

    def _read_float(self, name: str) -> Tensor:
        tensor = self._tensors[name].read()
        try:
            arithmetic.require_finite(tensor, name)
        except arithmetic.NonFiniteError as error:
            raise CheckpointError(self.path, str(error)) from None
        return tensor

    def _read_scale(self, name: str) -> NDArray[np.float32]:
        scale = self._read_float(name)
        if (scale <= 0).any():
            raise CheckpointError(self.path, f"tensor {name} must be positive, is {scale.min()}")
        # Engines may take denormal numbers for zero.
        wrong = (arithmetic.round_to_bfloat16(scale) != scale) | (scale < arithmetic.BFLOAT16_TINY)
        if wrong.any():
            raise CheckpointError(self.path, f"tensor {name} is not a normal bfloat16 number: {scale[wrong][0]}")
        return scale

    def _read_weight(self, name: str, bits: int) -> QuantizedWeight:
        stored_name = f"{name}.weight_packed" if bits == 4 else f"{name}.weight_codes"
        stored, scale = self._tensors[stored_name].read(), self._read_scale(f"{name}.weight_scale")
        columns = (self.config.linear_shapes() | self.config.table_shapes())[name][1]
        if bits == 4 and columns % 2 and (stored[:, -1] >> 4).any():
            raise CheckpointError(self.path, f"tensor {stored_name} has an odd row whose padding nibble is not zero")
        return QuantizedWeight(stored, columns, bits, scale)

    def _check_shared_inputs(self) -> None:
        """Layers that read one tensor have one static scale: an engine quantizes the tensor once."""
        for layer in range(self.config.num_hidden_layers):
            for sites in SHARED_INPUTS:
                names = [f"model.layers.{layer}.{LINEAR_SITES[site]}.input_scale" for site in sites]
                scales = {name: self._read_scale(name)[0] for name in names if name in self._tensors}
                if len(set(scales.values())) > 1:
                    raise CheckpointError(
                        self.path, f"tensors {_listed(scales)} belong to layers that read one tensor, but differ"
                    )

    def _drop_tied_head(self, unclaimed: dict[str, StoredTensor]) -> None:
        """Where the head stands in the file although it is tied, it must be the embedding."""
        head, embedding = unclaimed.pop(f"{HEAD}.weight", None), self._tensors.get(f"{EMBEDDING}.weight")
        if head is None:
            return
        same = embedding is not None and (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
        if not same or not np.array_equal(
            head.read().view(np.uint8), self._tensors[f"{EMBEDDING}.weight"].read().view(np.uint8)
        ):
            raise CheckpointError(
                self.path,
                "config.json ties lm_head.weight to model.embed_tokens.weight, but the two differ; "
                "set tie_word_embeddings to false if the head is the model's own",
            )


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


def _read_scheme(root: Path, config: LlamaConfig, quantization: dict[str, Any] | None) -> Scheme | None:
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


def _claim(
    unclaimed: dict[str, StoredTensor], root: Path, name: str, shape: tuple[int, ...], dtypes: tuple[np.dtype[Any], ...]
) -> StoredTensor:
    tensor = unclaimed.pop(name, None)
    if tensor is None:
        raise CheckpointError(root, f"tensor {name} is missing")
    if tensor.shape != shape or tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise CheckpointError(
            root, f"tensor {name} is {tensor.dtype} {list(tensor.shape)}, expected {wanted} {list(shape)}"
        )
    return tensor


def _listed(names: Mapping[str, Any]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")
