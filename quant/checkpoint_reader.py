"""Reads a checkpoint directory tensor by tensor, strictly; `quant.format` says what stands in it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant import arithmetic
from quant.checkpoint_config import read_config, read_provenance, read_scheme
from quant.llama import EMBEDDING, HEAD, CheckpointError
from quant.scheme import LINEAR_SITES, SHARED_INPUTS, LinearScheme
from quant.tensors import FLOAT_DTYPES, StoredTensor, Tensor, open_tensors
from quant.tokenizer import check_tokenizer
from quant.weights import QuantizedLinear, QuantizedWeight

ROTARY_BUFFER = ".rotary_emb.inv_freq"


class CheckpointReader:
    """A checkpoint directory of which each tensor is read, and checked, when it is asked for.

    Opening it checks all that can be known without reading weights: config, scheme, tokenizer, the names, shapes and
    types of all tensors.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises `CheckpointError` as `read_checkpoint` does."""
        self.path = Path(path)
        self.config, quantization = read_config(self.path)
        self.scheme = read_scheme(self.path, self.config, quantization)
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
