"""The KV cache of the reference runner: keys and values of every layer, in blocks, as the scheme holds them.

Shapes: L tokens of one slice, P positions of one sequence up to the slice's end, G key/value heads, C head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quant import arithmetic
from quant.llama import LlamaConfig
from runtime.engine.runner import SequenceSlice

Floats = NDArray[np.float32]
BlockTable = NDArray[np.int32]
Rows = tuple[int, BlockTable, NDArray[np.integer]]
"""A layer, and of each position its block and its row in the block."""


class PagedCache:
    """Keys and values as [layers, blocks, block_size, G, …].

    At 16 bits they are held in `kv_float`, and read as float32.
    At 8 and 4 bits they are codes, and for each token and head a bfloat16 scale and a zero point. A token's keys and
    values are quantized once, when they are written; the token itself reads what was written, as all later ones do,
    so that it does not matter how a prompt was cut.
    """

    def __init__(
        self,
        config: LlamaConfig,
        kv_bits: int,
        num_blocks: int,
        block_size: int,
        kv_float: type[np.generic] = np.float32,
    ) -> None:
        """Raises `MemoryError` or `ValueError` (numpy's) where there is no memory for it."""
        self.num_blocks, self.block_size = num_blocks, block_size
        heads = (config.num_hidden_layers, num_blocks, block_size, config.num_key_value_heads)
        self._keys, self._values = (
            _Floats(heads, config.head_dim, kv_float) if kv_bits == 16 else _Codes(heads, config.head_dim, kv_bits)
            for _ in range(2)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(stored.nbytes for stored in (*self._keys.arrays, *self._values.arrays))

    def extend(self, layer: int, slice_: SequenceSlice, k_LGC: Floats, v_LGC: Floats) -> tuple[Floats, Floats]:
        """Writes a slice's keys and values; returns those of the whole sequence so far, [P, G, C] each."""
        end = slice_.start + len(slice_.token_ids)
        positions = np.arange(slice_.start, end)
        at = layer, slice_.block_table[positions // self.block_size], positions % self.block_size
        self._keys.write(at, k_LGC)
        self._values.write(at, v_LGC)
        table = slice_.block_table[: -(-end // self.block_size)]
        return self._keys.read(layer, table, end), self._values.read(layer, table, end)

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """See `ModelRunner.copy_blocks`."""
        for stored in (*self._keys.arrays, *self._values.arrays):
            stored[:, list(targets)] = stored[:, list(sources)]  # reads all sources before it writes


class _Floats:
    """Keys or values as floats."""

    def __init__(self, heads: tuple[int, ...], head_dim: int, dtype: type[np.generic]) -> None:
        # zeros, not empty, costs nothing: the system maps a page when it is first written.
        self._values = np.zeros((*heads, head_dim), dtype)
        self.arrays: tuple[NDArray[Any], ...] = (self._values,)

    def write(self, at: Rows, x_LGC: Floats) -> None:
        self._values[at] = x_LGC

    def read(self, layer: int, table: BlockTable, end: int) -> Floats:
        return np.asarray(_gathered(self._values, layer, table, end), np.float32)


class _Codes:
    """Keys or values as codes of 8 bits, or of 4, two a byte, the even channel in the low nibble."""

    def __init__(self, heads: tuple[int, ...], head_dim: int, bits: int) -> None:
        self._bits = bits
        self._codes = np.zeros((*heads, head_dim * bits // 8), np.uint8)
        self._scales = np.zeros((*heads, 1), ml_dtypes.bfloat16)  # what `quantize_kv` rounds them to
        self._zeros = np.zeros((*heads, 1), np.uint8)
        self.arrays: tuple[NDArray[Any], ...] = (self._codes, self._scales, self._zeros)

    def write(self, at: Rows, x_LGC: Floats) -> None:
        codes, self._scales[at], self._zeros[at] = arithmetic.quantize_kv(x_LGC, self._bits)
        self._codes[at] = codes if self._bits == 8 else codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))

    def read(self, layer: int, table: BlockTable, end: int) -> Floats:
        codes, scales, zeros = (
            _gathered(stored, layer, table, end) for stored in (self._codes, self._scales, self._zeros)
        )
        if self._bits == 4:
            nibbles = np.stack([codes & np.uint8(0xF), codes >> np.uint8(4)], axis=-1)
            codes = nibbles.reshape(*codes.shape[:-1], -1)
        return arithmetic.dequantize_kv(codes, scales.astype(np.float32), zeros)


def _gathered(stored: NDArray[Any], layer: int, table: BlockTable, end: int) -> NDArray[Any]:
    """The positions 0 … end-1 of the sequence that has this block table, [P, G, …]."""
    blocks: NDArray[Any] = stored[layer, table]
    return blocks.reshape(-1, *blocks.shape[2:])[:end]
