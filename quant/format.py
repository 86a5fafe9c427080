"""Reads and writes checkpoints: Hugging Face Llama in 16 or 32 bit, and the 4-bit form. No torch.

A checkpoint is a directory:

    config.json          Hugging Face Llama; a 4-bit one has `quantization_config.quant_method = "osp"`
    model.safetensors    one file, or shards with `model.safetensors.index.json`; a 4-bit one has osp.safetensors
    tokenizer.json       its SHA-256 stands in osp.json
    osp.json             where the checkpoint comes from and what was measured (optional for foreign models)

A linear layer `P` is one tensor `P.weight` (bfloat16, float16 or float32, [M, K]), or, in 4-bit, three:

    P.weight_packed  uint8   [M, ceil(K / 2)]   two codes a byte, low nibble first (`arithmetic.pack`)
    P.weight_scale   float32 [1]                bfloat16-representable
    P.input_scale    float32 [1]                bfloat16-representable

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

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from quant import arithmetic
from quant.files import read_json, sha256, write_json
from quant.llama import CheckpointError, LlamaConfig
from quant.scheme import Scheme, SchemeError
from quant.tensors import FLOAT_DTYPES, INDEX_FILE, QUANTIZED_WEIGHTS_FILE, WEIGHTS_FILE, Tensor, read_tensors
from quant.tokenizer import check_tokenizer, read_tokenizer

__all__ = [
    "FORMAT_VERSION",
    "INDEX_FILE",
    "QUANTIZED_WEIGHTS_FILE",
    "WEIGHTS_FILE",
    "Checkpoint",
    "QuantizedLinear",
    "Tensor",
    "check_tokenizer",
    "read_checkpoint",
    "read_config",
    "read_provenance",
    "read_tokenizer",
    "sha256",
    "write_json",
    "write_quantized",
]

FORMAT_VERSION = 1
ROTARY_BUFFER = ".rotary_emb.inv_freq"


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """A 4-bit linear layer without bias: `packed` uint8 [M, ceil(K/2)], and one scale each for weight and input."""

    packed: NDArray[np.uint8]
    in_features: int
    weight_scale: np.float32
    input_scale: np.float32

    @property
    def codes(self) -> NDArray[np.int8]:
        """The codes, int8 [M, K]."""
        return arithmetic.unpack(self.packed, self.in_features)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and both scales."""
        return self.packed.nbytes + 8


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A validated checkpoint in memory.

    Attributes:
        path: the directory that it was read from.
        config: the model's shape.
        scheme: None for full precision.
        linears: the body's linear layers by module name ("model.layers.0.self_attn.q_proj"), each a float array
            [M, K] as stored, or a `QuantizedLinear`.
        floats: all other parameters by full name ("model.embed_tokens.weight"), as stored. A tied model has
            no "lm_head.weight".
        provenance: the content of osp.json, or {}.
    """

    path: Path
    config: LlamaConfig
    scheme: Scheme | None
    linears: dict[str, Tensor | QuantizedLinear]
    floats: dict[str, Tensor]
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def precision(self) -> str:
        """The scheme's name ("w4a4"), or the stored float type ("bfloat16")."""
        return self.scheme.name if self.scheme else str(self.floats["model.embed_tokens.weight"].dtype)

    @property
    def head(self) -> Tensor:
        """The output projection [V, D]; the embedding where the two are tied."""
        tied = self.config.tie_word_embeddings
        return self.floats["model.embed_tokens.weight" if tied else "lm_head.weight"]


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads and validates a checkpoint directory.

    Raises:
        CheckpointError: the directory is no checkpoint, a file is missing or truncated, a tensor is missing,
            unexpected, of the wrong shape or type or not finite, or the tokenizer does not fit the model.
    """
    root = Path(path)
    config, quantization = read_config(root)
    scheme = _read_scheme(root, quantization)
    provenance = read_provenance(root)
    check_tokenizer(root, config, provenance)
    tensors = {name: tensor for name, tensor in read_tensors(root).items() if not name.endswith(ROTARY_BUFFER)}
    floats = {name: _take(tensors, root, name, shape, FLOAT_DTYPES) for name, shape in config.float_shapes().items()}
    linears = {
        name: _take_linear(tensors, root, name, shape, quantized=scheme is not None)
        for name, shape in config.linear_shapes().items()
    }
    if config.tie_word_embeddings:
        _drop_tied_head(tensors, root, floats["model.embed_tokens.weight"])
    if tensors:
        raise CheckpointError(
            root, f"unexpected tensors: {_listed(tensors)}; {config.describe()} has no such parameters"
        )
    return Checkpoint(root, config, scheme, linears, floats, provenance)


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
    linears: Mapping[str, QuantizedLinear],
    floats: Mapping[str, Tensor],
    provenance: Mapping[str, Any],
) -> None:
    """Writes the config, weights and osp.json of a 4-bit checkpoint into `root`, which must exist.

    Args:
        config_json: the source model's config.json.
        floats: the parameters that stay in 16 bit; stored as bfloat16.

    Raises:
        NonFiniteError: a parameter is too large for bfloat16.
    """
    with np.errstate(over="ignore"):
        tensors: dict[str, Tensor] = {name: np.asarray(t, ml_dtypes.bfloat16) for name, t in floats.items()}
    for name, tensor in tensors.items():
        arithmetic.require_finite(tensor, name)
    for name, linear in linears.items():
        tensors[f"{name}.weight_packed"] = np.ascontiguousarray(linear.packed)
        tensors[f"{name}.weight_scale"] = np.array([linear.weight_scale], np.float32)
        tensors[f"{name}.input_scale"] = np.array([linear.input_scale], np.float32)
    quantization = {"quant_method": "osp", "format_version": FORMAT_VERSION, "scheme": scheme.to_dict()}
    # transformers 4 wrote torch_dtype for what is now dtype.
    config_json = {key: value for key, value in config_json.items() if key != "torch_dtype"}
    write_json(root / "config.json", {**config_json, "quantization_config": quantization, "dtype": "bfloat16"})
    write_json(root / "osp.json", provenance)
    save_file(tensors, root / QUANTIZED_WEIGHTS_FILE, metadata={"format": "pt"})
    # safetensors lets only the owner read its files; a server often runs as another user.
    shutil.copymode(root / "config.json", root / QUANTIZED_WEIGHTS_FILE)


def _read_scheme(root: Path, quantization: dict[str, Any] | None) -> Scheme | None:
    if quantization is None:
        return None
    method, version = quantization.get("quant_method"), quantization.get("format_version")
    if method != "osp":
        raise CheckpointError(root, f"quantized by {shortened(method)}; this reader knows 'osp' and full precision")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            root, f"4-bit format version {shortened(version)}; this reader knows version {FORMAT_VERSION}"
        )
    try:
        return Scheme.from_dict(quantization.get("scheme", {}))
    except SchemeError as error:
        raise CheckpointError(root, str(error)) from None


def _take(
    tensors: dict[str, Tensor],
    root: Path,
    name: str,
    shape: tuple[int, ...],
    dtypes: tuple[np.dtype[Any], ...],
) -> Tensor:
    tensor = tensors.pop(name, None)
    if tensor is None:
        raise CheckpointError(root, f"tensor {name} is missing")
    if tensor.shape != shape or tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise CheckpointError(
            root, f"tensor {name} is {tensor.dtype} {list(tensor.shape)}, expected {wanted} {list(shape)}"
        )
    if tensor.dtype in FLOAT_DTYPES:
        try:
            arithmetic.require_finite(tensor, name)
        except arithmetic.NonFiniteError as error:
            raise CheckpointError(root, str(error)) from None
    return tensor


def _take_linear(
    tensors: dict[str, Tensor], root: Path, name: str, shape: tuple[int, int], *, quantized: bool
) -> Tensor | QuantizedLinear:
    if not quantized:
        return _take(tensors, root, f"{name}.weight", shape, FLOAT_DTYPES)
    rows, columns = shape
    packed = _take(tensors, root, f"{name}.weight_packed", (rows, (columns + 1) // 2), (np.dtype(np.uint8),))
    scales = {
        kind: _take(tensors, root, f"{name}.{kind}", (1,), (np.dtype(np.float32),))[0]
        for kind in ("weight_scale", "input_scale")
    }
    for kind, scale in scales.items():
        if scale <= 0:
            raise CheckpointError(root, f"tensor {name}.{kind} must be positive, is {scale}")
        if arithmetic.round_to_bfloat16(scale) != scale:
            raise CheckpointError(root, f"tensor {name}.{kind} is not a bfloat16 number: {scale}")
    if columns % 2 and (packed[:, -1] >> 4).any():
        raise CheckpointError(root, f"tensor {name}.weight_packed has an odd row whose padding nibble is not zero")
    return QuantizedLinear(packed, columns, scales["weight_scale"], scales["input_scale"])


def _drop_tied_head(tensors: dict[str, Tensor], root: Path, embedding_VD: Tensor) -> None:
    head_VD = tensors.pop("lm_head.weight", None)
    if head_VD is None:
        return
    same_kind = (head_VD.dtype, head_VD.shape) == (embedding_VD.dtype, embedding_VD.shape)
    if not same_kind or not np.array_equal(head_VD.view(np.uint8), embedding_VD.view(np.uint8)):
        raise CheckpointError(
            root,
            "config.json ties lm_head.weight to model.embed_tokens.weight, but the two differ; "
            "set tie_word_embeddings to false if the head is the model's own",
        )


def _listed(names: Mapping[str, Any]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")
