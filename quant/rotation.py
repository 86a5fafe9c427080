"""Full rotation: a model whose residual stream and heads hold no outliers, and which computes the same.

Hidden states are rows h of width D, and every weight W is [outputs, inputs]. With g the gain of the norm before a
layer, R = diag(signs) H^T an orthogonal matrix of random signs and the Hadamard transform of width D, and C that of
a head's width:

    embedding              E  ->  E R
    reads the stream       W  ->  W diag(g) R                      q, k, v, gate, up, head; the gains become ones
    writes to the stream   W  ->  R^T W                            o, down
    a value head           W_v  ->  C W_v                          its C rows
    the query heads of it  W_o  ->  W_o C^T                        each head's C columns

The hidden states become h R. RMSNorm divides by their root mean square, which R leaves as it is, and subtracts no mean,
so that none has to be folded. A head that is tied to the embedding gets gains of its own and is tied no longer.

Source: Ashkboos et al., QuaRot, arXiv 2404.00456, sections 4 and 5. The Hadamard transform of down_proj's input is not
done here but at quantization, for the engine takes part in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from quant.format import CheckpointReader
from quant.hadamard import Hadamard
from quant.llama import HEAD, CheckpointError
from quant.tensors import Tensor
from quant.weights import QuantizedLinear, QuantizedWeight

Rows = NDArray[np.floating]

CHUNK = 2**16
"""Weights that are rotated at a time: their float64 copies then stay in the cache."""


class RotatedSource:
    """A full-precision checkpoint, rotated as it is read: one of its weights is in memory at a time.

    Attributes:
        path, provenance: those of the checkpoint.
        config: that of the checkpoint, with a head of its own.
        scheme: None.
    """

    def __init__(self, source: CheckpointReader, seed: int = 0, dtype: DTypeLike = np.float32) -> None:
        """Reads nothing yet.

        Args:
            seed: of the random signs.
            dtype: of the rotated weights, which are computed in float64.

        Raises:
            CheckpointError: the model is quantized, or its width is odd.
        """
        config = source.config
        if source.scheme is not None:
            raise CheckpointError(source.path, f"is quantized already ({source.scheme.label}), and codes do not rotate")
        if config.hidden_size % 2:
            raise CheckpointError(source.path, f"a residual stream of odd width, {config.hidden_size}, does not rotate")
        self.path, self.provenance = source.path, source.provenance
        self.config = dataclasses.replace(config, tie_word_embeddings=False)
        self.scheme = None
        self._source = source
        self._dtype = np.dtype(dtype)
        self._signs_D = np.random.default_rng(seed).choice((-1.0, 1.0), config.hidden_size)
        self._stream, self._head = Hadamard.of_width(config.hidden_size), Hadamard.of_width(config.head_dim)

    def linear(self, name: str) -> NDArray[np.floating]:
        """The rotated weight of a linear layer, [M, K]; errors as of `CheckpointReader.linear`."""
        if name == HEAD:
            return self.head()
        weight_MK = _plain(self._source.linear(name))
        block, _, site = name.rsplit(".", 2)
        if site == "o_proj":
            weight_MK = self._rotated(weight_MK, self._rotate_heads)
        if site in ("o_proj", "down_proj"):
            return self._rotated(weight_MK.T, self._rotate_stream).T.astype(self._dtype, order="C")
        norm = "post_attention_layernorm" if site in ("gate_proj", "up_proj") else "input_layernorm"
        gain_D = self._gain(f"{block}.{norm}.weight")
        weight_MK = self._rotated(weight_MK, lambda rows_RD: self._rotate_stream(rows_RD * gain_D))
        if site == "v_proj":
            weight_MK = self._rotated(weight_MK.T, self._rotate_heads).T
        return weight_MK.astype(self._dtype, order="C")

    def embedding(self) -> NDArray[np.floating]:
        """The rotated embedding, [V, D]; errors as of `CheckpointReader.embedding`."""
        return self._rotated(_plain(self._source.embedding()), self._rotate_stream, self._dtype)

    def head(self) -> NDArray[np.floating]:
        """The rotated head with the gain of the norm before it, [V, D]; errors as of `CheckpointReader.head`."""
        gain_D = self._gain("model.norm.weight")
        table_VD = _plain(self._source.head())
        return self._rotated(table_VD, lambda rows_RD: self._rotate_stream(rows_RD * gain_D), self._dtype)

    def norm(self, name: str) -> NDArray[np.floating]:
        """Ones, [D], for the gains have moved into the weights; errors as of `CheckpointReader.norm`."""
        return np.ones_like(self._gain(name), self._dtype)

    def _gain(self, name: str) -> Rows:
        return self._source.norm(name).astype(np.float64)

    def _rotate_stream(self, rows_RD: Rows) -> Rows:
        """Each row times R."""
        return self._stream.apply(rows_RD * self._signs_D)

    def _rotate_heads(self, rows_RK: Rows) -> Rows:
        """C channels after C channels of each row, by the transform of a head."""
        heads_RHC = rows_RK.reshape(len(rows_RK), -1, self.config.head_dim)
        return self._head.apply(heads_RHC).reshape(rows_RK.shape)

    def _rotated(
        self, weight_MK: NDArray[Any], rotate: Callable[[Rows], Rows], dtype: DTypeLike = np.float64
    ) -> NDArray[np.floating]:
        """What `rotate` makes of rows of float64, some at a time."""
        rotated_MK = np.empty(weight_MK.shape, dtype)
        rows = max(1, CHUNK // weight_MK.shape[1])
        for start in range(0, len(weight_MK), rows):
            rotated_MK[start : start + rows] = rotate(weight_MK[start : start + rows].astype(np.float64))
        return rotated_MK


def _plain(weight: Tensor | QuantizedLinear | QuantizedWeight) -> Tensor:
    assert isinstance(weight, np.ndarray)  # a source without a scheme has no others
    return weight
