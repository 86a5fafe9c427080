"""The weights of a checkpoint directory: one safetensors file, or shards and the index that says what is where."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from quant.files import read_json
from quant.llama import CheckpointError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# transformers ignores a quant_method that it does not know and would fill in random weights: it must find no file.
QUANTIZED_WEIGHTS_FILE = "osp.safetensors"

FLOAT_DTYPES = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32))

# Others, such as F8_E4M3, have no numpy type: asking for such an array ends in an AttributeError.
NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "BOOL": np.dtype(np.bool_),
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
}

Tensor = NDArray[Any]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies, and what it is. Nothing of it is in memory; its file stays mapped meanwhile."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    root: Path
    file: str
    mapped: Any

    def read(self) -> Tensor:
        """A copy in memory.

        Raises:
            CheckpointError: the file has become unreadable.
        """
        try:
            tensor: Tensor = self.mapped.get_tensor(self.name)
        except (SafetensorError, OSError) as error:
            raise _damaged(self.root, self.file, error) from error
        return tensor


def open_tensors(root: Path) -> dict[str, StoredTensor]:
    """Every tensor by name, each in the one file that it belongs to.

    Raises:
        CheckpointError: a file is missing or damaged, the index names what is no file of the checkpoint, a tensor
            lies in another shard than the index states or in none, or is of a type that numpy does not know.
    """
    for name in (QUANTIZED_WEIGHTS_FILE, WEIGHTS_FILE):  # one file goes before shards, as in transformers
        if os.path.lexists(root / name):
            return _open_file(root, name)
    if not os.path.lexists(root / INDEX_FILE):
        raise CheckpointError(root, f"{WEIGHTS_FILE} is missing (as are {INDEX_FILE} and {QUANTIZED_WEIGHTS_FILE})")
    shard_of = _read_index(root)
    tensors: dict[str, StoredTensor] = {}
    for shard in dict.fromkeys(shard_of.values()):
        for name, tensor in _open_file(root, shard).items():
            if shard_of.get(name) != shard:
                stated = f"states {shard_of[name]}" if name in shard_of else "does not name it"
                raise CheckpointError(root, f"tensor {name} lies in {shard}, but {INDEX_FILE} {stated}")
            tensors[name] = tensor
    for name, shard in shard_of.items():
        if name not in tensors:
            raise CheckpointError(root, f"tensor {name} is missing from {shard}, where {INDEX_FILE} states it")
    return tensors


def _read_index(root: Path) -> Mapping[str, str]:
    """Tensor name -> file name. An index comes with the model, so it may name nothing but the model's own files."""
    shard_of = read_json(root, INDEX_FILE, "").get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise CheckpointError(root, f"{INDEX_FILE} names no shards")
    for shard in shard_of.values():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(
                root, f"{INDEX_FILE}: {shortened(shard)} is not the name of a .safetensors file beside it"
            )
    missing = sorted({shard for shard in shard_of.values() if not os.path.lexists(root / shard)})
    if missing:
        listed = ", ".join(shard[:80] for shard in missing[:4])
        raise CheckpointError(root, f"{INDEX_FILE} names shards that are missing: {listed}")
    return shard_of


def _open_file(root: Path, file: str) -> dict[str, StoredTensor]:
    if not os.path.isfile(root / file):
        raise CheckpointError(root, f"{file} cannot be read: it is not a file")
    tensors: dict[str, StoredTensor] = {}
    try:
        mapped: Any = safe_open(root / file, "numpy")
        for name in mapped.keys():  # noqa: SIM118 - not a dict
            stored = mapped.get_slice(name)
            dtype = NUMPY_DTYPES.get(stored.get_dtype())
            if dtype is None:
                raise CheckpointError(
                    root, f"tensor {name} is stored as {stored.get_dtype()}, a type that is not supported"
                )
            tensors[name] = StoredTensor(name, tuple(stored.get_shape()), dtype, root, file, mapped)
    except (SafetensorError, OSError) as error:
        raise _damaged(root, file, error) from error
    return tensors


def _damaged(root: Path, file: str, error: Exception) -> CheckpointError:
    return CheckpointError(root, f"{file} cannot be read ({error}); the file is truncated or damaged")
