"""Quantized matrices and linear layers in memory, and the tensors that they are stored as. No torch."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quant import arithmetic
from quant.tensors import Tensor


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A matrix [M, K] of codes.

    Attributes:
        stored: 4 bits: packed, uint8 [M, ceil(K/2)]; 8 bits: int8 [M, K].
        columns: K.
        bits: 4 or 8.
        scale: float32 [1], or [M], one a row.
    """

    stored: NDArray[np.uint8] | NDArray[np.int8]
    columns: int
    bits: int
    scale: NDArray[np.float32]

    @classmethod
    def from_codes(cls, codes_MK: NDArray[np.int8], bits: int, scale: NDArray[np.float32]) -> QuantizedWeight:
        """Of int8 codes; they are packed where they have 4 bits."""
        stored = arithmetic.pack(codes_MK) if bits == 4 else np.ascontiguousarray(codes_MK)
        return cls(stored, codes_MK.shape[1], bits, scale)

    @property
    def codes(self) -> NDArray[np.int8]:
        """The codes, int8 [M, K]."""
        return (
            arithmetic.unpack(self.stored.view(np.uint8), self.columns) if self.bits == 4 else self.stored.view(np.int8)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.stored.nbytes + self.scale.nbytes

    @property
    def shape(self) -> tuple[int, int]:
        """(M, K)."""
        return self.stored.shape[0], self.columns

    def dequantized(self) -> NDArray[np.float32]:
        """`codes * scale`, float32 [M, K]; exact."""
        values: NDArray[np.float32] = self.codes.astype(np.float32) * self.scale[:, None]
        return values


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """A linear layer without bias whose weight is quantized.

    Attributes:
        input_bits: 4 or 8; 16 where the input is not quantized.
        input_scale: the static scale; None where every token has its own, or where the input is not quantized.
        rotated: the input passes `Hadamard.of_width(K)` first; the weight has been rotated already.
    """

    weight: QuantizedWeight
    input_bits: int
    input_scale: np.float32 | None = None
    rotated: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.weight.nbytes + (0 if self.input_scale is None else 4)


def stored_tensors(name: str, value: Tensor | QuantizedWeight | QuantizedLinear) -> dict[str, Tensor]:
    """The tensors that a module called `name` is stored as; floats become bfloat16.

    Raises:
        NonFiniteError: a float is too large for bfloat16.
    """
    if isinstance(value, QuantizedLinear):
        tensors = stored_tensors(name, value.weight)
        if value.input_scale is not None:
            tensors[f"{name}.input_scale"] = np.array([value.input_scale], np.float32)
        return tensors
    if isinstance(value, QuantizedWeight):
        kind = "weight_packed" if value.bits == 4 else "weight_codes"
        return {f"{name}.{kind}": np.ascontiguousarray(value.stored), f"{name}.weight_scale": value.scale}
    with np.errstate(over="ignore"):
        rounded = np.asarray(value, ml_dtypes.bfloat16)
    arithmetic.require_finite(rounded, f"{name}.weight")
    return {f"{name}.weight": rounded}
