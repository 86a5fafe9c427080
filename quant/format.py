"""Reads and writes checkpoints: Hugging Face Llama in 16 or 32 bit, and the 4-bit form. No torch.

A checkpoint is a directory:

    config.json          Hugging Face Llama; a 4-bit one has `quantization_config.quant_method = "osp"`
    model.safetensors    one file, or shards with `model.safetensors.index.json`; a 4-bit one has osp.safetensors
    tokenizer.json       its SHA-256 stands in osp.json
    osp.json             where the checkpoint comes from and what was measured (optional for foreign models)

A linear layer `P` is one tensor `P.weight` (bfloat16, float16 or float32, [M, K]), or, in 4-bit, three:

    P.weight_packed  uint8   [M, ceil(K / 2)]   two codes a byte, low nibble first (`arithmetic.pack`)
    P.weight_scale   float32 [1]                bfloat16-representable
    P.input_scale    float32 [1]

Loading is strict: every tensor is consumed and every parameter is set, or `CheckpointError` names what is wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from quant import arithmetic
from quant.llama import CheckpointError, LlamaConfig
from quant.scheme import Scheme, SchemeError

FORMAT_VERSION = 1
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
INDEX_FILE = "model.safetensors.index.json"
# transformers ignores a quant_method that it does not know and would fill in random weights: it must find no file.
QUANTIZED_WEIGHTS_FILE = "osp.safetensors"
FLOAT_DTYPES = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32))

Tensor = NDArray[Any]


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
    tensors = dict(iterate_tensors(root))
    floats = {name: _take(tensors, root, name, shape, FLOAT_DTYPES) for name, shape in config.float_shapes().items()}
    linears = {
        name: _take_linear(tensors, root, name, shape, quantized=scheme is not None)
        for name, shape in config.linear_shapes().items()
    }
    if tensors:
        raise CheckpointError(
            root, f"unexpected tensors: {_listed(tensors)}; {config.describe()} has no such parameters"
        )
    return Checkpoint(root, config, scheme, linears, floats, provenance)


def read_config(root: Path) -> tuple[LlamaConfig, dict[str, Any] | None]:
    """The model's shape and the `quantization_config` of config.json (None where there is none)."""
    if not root.is_dir():
        raise CheckpointError(root, "no such directory; a checkpoint is a directory with config.json in it")
    config_json = _read_json(root, "config.json", "this is not a checkpoint directory")
    quantization = config_json.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise CheckpointError(root, f"config.json: quantization_config must be an object, is {quantization!r}")
    return LlamaConfig.from_json(root, config_json), quantization


def read_provenance(root: Path) -> dict[str, Any]:
    """The content of osp.json; {} where the checkpoint has none."""
    return _read_json(root, "osp.json", "") if (root / "osp.json").exists() else {}


def iterate_tensors(root: Path) -> Iterator[tuple[str, Tensor]]:
    """Every (name, array) of the checkpoint's safetensors files, one at a time, in file order."""
    for file in _weight_files(root):
        try:
            with safe_open(file, "numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dict
                    yield name, tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                root, f"{file.name} cannot be read ({error}); the file is truncated or damaged"
            ) from error


def read_tokenizer(root: Path) -> Tokenizer:
    """The tokenizer of a checkpoint, which encodes text whole and as text.

    Truncation and padding, which tokenizer.json may ask for, are off. A special token that is typed in a text is
    characters, not control; those that the post-processor adds (a beginning-of-sequence token) are still added.

    Raises:
        CheckpointError: tokenizer.json is missing or cannot be read.
    """
    try:
        tokenizer = Tokenizer.from_str((root / TOKENIZER_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        mend = "copy the tokenizer that the model was trained with there"
        raise CheckpointError(root, f"{TOKENIZER_FILE} is missing; {mend}") from None
    except Exception as error:  # noqa: BLE001 - the library raises no narrower type
        raise CheckpointError(root, f"{TOKENIZER_FILE} cannot be read: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def check_tokenizer(root: Path, config: LlamaConfig, provenance: Mapping[str, Any]) -> None:
    """Raises `CheckpointError` unless tokenizer.json is the one recorded and its ids fit the embedding."""
    vocabulary = read_tokenizer(root).get_vocab(with_added_tokens=True)
    recorded, actual = provenance.get("tokenizer_sha256"), sha256(root / TOKENIZER_FILE)
    if recorded is not None and recorded != actual:
        raise CheckpointError(
            root,
            f"{TOKENIZER_FILE} is not the one this model was made with: its SHA-256 is {actual[:12]}…, "
            f"osp.json records {str(recorded)[:12]}…",
        )
    highest = max(vocabulary.values(), default=-1)
    if not 0 <= highest < config.vocab_size:
        raise CheckpointError(
            root, f"{TOKENIZER_FILE} has ids up to {highest}, but the model's vocabulary is {config.vocab_size}"
        )


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


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Indented, with a final newline, as people read it."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """The hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_scheme(root: Path, quantization: dict[str, Any] | None) -> Scheme | None:
    if quantization is None:
        return None
    method, version = quantization.get("quant_method"), quantization.get("format_version")
    if method != "osp":
        raise CheckpointError(root, f"quantized by {method!r}; this reader knows 'osp' and full precision")
    if version != FORMAT_VERSION:
        raise CheckpointError(root, f"4-bit format version {version!r}; this reader knows version {FORMAT_VERSION}")
    try:
        return Scheme.from_dict(quantization.get("scheme", {}))
    except SchemeError as error:
        raise CheckpointError(root, str(error)) from None


def _read_json(root: Path, name: str, if_missing: str) -> dict[str, Any]:
    try:
        content = json.loads((root / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(root, f"{name} is missing; {if_missing}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(root, f"{name} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(root, f"{name} must hold a JSON object, not a {type(content).__name__}")
    return content


def _weight_files(root: Path) -> list[Path]:
    for name in (QUANTIZED_WEIGHTS_FILE, WEIGHTS_FILE):  # one file goes before shards, as in transformers
        if (root / name).exists():
            return [root / name]
    if not (root / INDEX_FILE).exists():
        raise CheckpointError(root, f"{WEIGHTS_FILE} is missing (as are {INDEX_FILE} and {QUANTIZED_WEIGHTS_FILE})")
    weight_map = _read_json(root, INDEX_FILE, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(root, f"{INDEX_FILE} names no shards")
    files = [root / name for name in dict.fromkeys(weight_map.values())]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise CheckpointError(root, f"{INDEX_FILE} names shards that are missing: {', '.join(missing)}")
    return files


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
    if arithmetic.round_to_bfloat16(scales["weight_scale"]) != scales["weight_scale"]:
        raise CheckpointError(root, f"tensor {name}.weight_scale is not a bfloat16 number: {scales['weight_scale']}")
    if columns % 2 and (packed[:, -1] >> 4).any():
        raise CheckpointError(root, f"tensor {name}.weight_packed has an odd row whose padding nibble is not zero")
    return QuantizedLinear(packed, columns, scales["weight_scale"], scales["input_scale"])


def _listed(names: Mapping[str, Any]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")
