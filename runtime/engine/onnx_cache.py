"""The KV cache of the ONNX Runtime runner: a sequence's keys and values side by side, in a slot of a whole context.

Shapes: G key/value heads, P positions of a context, C head dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.llama import LlamaConfig


class SlotCache(ABC):
    """Keys and values of all slots, [slots, G, P, C] for each layer.

    Attributes:
        num_slots: how many there are.
        filled: of each slot, at how many positions something was written by its last sequence.
    """

    device: str
    """Where the memory is, as ONNX Runtime calls it."""

    def __init__(self, config: LlamaConfig, num_slots: int, dtype: np.dtype[Any]) -> None:
        """Raises `MemoryError` or `ValueError` where there is no memory for it."""
        self.num_slots = num_slots
        self.filled = np.zeros(num_slots, np.int64)
        self._dtype = dtype
        self._slot_shape = config.num_key_value_heads, config.max_position_embeddings, config.head_dim
        self._names = [f"{layer}.{kind}" for layer in range(config.num_hidden_layers) for kind in ("key", "value")]
        self._addresses = self._allocated((num_slots, *self._slot_shape), dtype)

    def bind_past(self, binding: Any, first: int, count: int) -> None:
        """Binds the graph's inputs `past.…` to `count` neighbouring slots, contiguous [count, G, P, C]."""
        for name in self._names:
            binding.bind_input(f"past.{name}", *self._place(name, first, count))

    def bind_present(self, binding: Any, first: int, count: int) -> None:
        """Binds the graph's outputs `present.…` to slots: to those of `bind_past`, and nothing has to be copied."""
        for name in self._names:
            binding.bind_output(f"present.{name}", *self._place(name, first, count))

    @abstractmethod
    def _allocated(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> dict[str, int]:
        """Takes memory for each of `_names`, zeroed; gives the addresses."""

    def _place(self, name: str, first: int, count: int) -> tuple[str, int, Any, tuple[int, ...], int]:
        slot_bytes = self._dtype.itemsize * int(np.prod(self._slot_shape))
        address = self._addresses[name] + first * slot_bytes
        return self.device, 0, self._dtype.type, (count, *self._slot_shape), address


class HostSlotCache(SlotCache):
    """In the memory of the CPU."""

    device = "cpu"

    def copy(self, source: int, target: int) -> None:
        """Copies a slot; what was never written is not copied."""
        end = self.filled[source]
        for array in self._arrays.values():
            array[target, :, :end] = array[source, :, :end]
        self.filled[target] = end

    def _allocated(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> dict[str, int]:
        # zeros, not empty, costs nothing: the system maps a page when it is first written.
        self._arrays: dict[str, NDArray[Any]] = {name: np.zeros(shape, dtype) for name in self._names}
        return {name: array.ctypes.data for name, array in self._arrays.items()}


class DeviceSlotCache(SlotCache):
    """In the memory of a GPU, a part of which ONNX Runtime copies for nobody but the graph."""

    device = "cuda"

    def _allocated(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> dict[str, int]:
        from onnxruntime import OrtValue

        # zeros, not empty: a kernel may multiply what lies past a sequence's end by 0, and that must not give NaN.
        zeros = np.zeros(shape, dtype)
        try:
            self._values = {name: OrtValue.ortvalue_from_numpy(zeros, self.device, 0) for name in self._names}
        except Exception as error:  # the library's errors have no class of their own
            raise MemoryError(str(error)) from error
        return {name: value.data_ptr() for name, value in self._values.items()}
