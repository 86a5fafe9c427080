"""The KV cache of the ONNX Runtime runner: a sequence's keys and values side by side, in a slot of a whole context.

Shapes: G key/value heads, P positions of a context, C head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from quant.llama import LlamaConfig

Floats = NDArray[np.float32]


class SlotCache:
    """Keys and values of all slots, float32 [slots, G, P, C] for each layer.

    Attributes:
        filled: of each slot, at how many positions something was written by its last sequence.
    """

    def __init__(self, config: LlamaConfig, num_slots: int) -> None:
        """Raises `MemoryError` or `ValueError` (numpy's) where there is no memory for it."""
        self.num_slots = num_slots
        shape = num_slots, config.num_key_value_heads, config.max_position_embeddings, config.head_dim
        # zeros, not empty, costs nothing: the system maps a page when it is first written.
        self._arrays = {
            f"{layer}.{kind}": np.zeros(shape, np.float32)
            for layer in range(config.num_hidden_layers)
            for kind in ("key", "value")
        }
        self.filled = np.zeros(num_slots, np.int64)

    def views(self, first: int, count: int) -> Iterator[tuple[str, Floats]]:
        """By name, the keys or values of `count` slots, contiguous [count, G, P, C]."""
        for name, array in self._arrays.items():
            yield name, array[first : first + count]

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """See `ModelRunner.copy_blocks`; what was never written is not copied."""
        for source, target in zip(sources, targets, strict=True):
            end = self.filled[source]
            for array in self._arrays.values():
                array[target, :, :end] = array[source, :, :end]
            self.filled[target] = end
