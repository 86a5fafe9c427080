"""The ONNX Runtime runner: a checkpoint's graph (`quant.onnx_llama`) over a KV cache of slots.

ONNX Runtime's attention wants a sequence's keys and values side by side. So a block of the cache is a slot that holds
a whole context, and a sequence has one block. Rows that decode are computed together, by neighbouring slots; a prompt,
or a piece of one, is a call of its own, for the attention takes several rows only where each adds one token.

Between the rows that decode may lie slots that do not: they compute a token too, for nothing, whose key and value go
where their own sequence will write next.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.onnx_directory import CACHE_TYPES
from runtime.engine.array_logits import ArrayLogits
from runtime.engine.base import EngineInfo
from runtime.engine.kv_capacity import default_num_blocks, too_long
from runtime.engine.onnx_cache import DeviceSlotCache, HostSlotCache
from runtime.engine.onnx_session import open_model
from runtime.engine.runner import SequenceSlice

LEAST_SLOTS = 8
"""Memory of a slot is taken as it fills, so that there may be more than would fit if all were full."""

WIDEST_GAP = 4
"""As many idle slots are computed along; a call for itself, which reads all weights again, costs more."""

MOST_BINDINGS = 64
"""So many runs of slots are remembered with their memory bound."""

Floats = NDArray[np.float32]


class OnnxRunner:
    """Runs a checkpoint in any scheme, or in full precision. Implements `ModelRunner`.

    Integer sums are exact and hence those of the reference. ONNX Runtime sums floats in orders of its own, which
    depend on how a prompt is cut: logits agree with a row alone within rounding, not bit for bit, unless a code falls
    on the other side of a rounding (docs/onnx.md says how often).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int = 0,
        provider: str = "cpu",
        num_slots: int | None = None,
    ) -> None:
        """Opens an exported directory or a checkpoint, see `onnx_session.open_model` for errors.

        Args:
            threads: 0 for as many as the process may use.
            provider: what the graph runs on, one of `onnx_provider.PROVIDERS`.
            num_slots: sequences that the KV cache holds; how many by default: see `default_num_blocks`.

        Raises:
            CheckpointError: also where there is not memory enough for one context.
        """
        model = open_model(path, threads, provider)
        config = model.config
        self._session, self._config = model.session, config
        self._bindings: dict[tuple[int, int], Any] = {}
        self._info = EngineInfo(
            "onnx", model.precision, config.max_position_embeddings, config.vocab_size, model.kernel
        )
        values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * self.block_size
        cache_dtype = np.dtype(CACHE_TYPES[model.device])
        slot_bytes = cache_dtype.itemsize * values
        if num_slots is None:
            num_slots = max(LEAST_SLOTS, default_num_blocks(Path(path), config, slot_bytes, self.block_size))
        try:
            memory = HostSlotCache if model.device == "cpu" else DeviceSlotCache
            self._cache = memory(config, num_slots, cache_dtype)
        except (MemoryError, ValueError):  # numpy raises ValueError for what no machine could address
            positions = num_slots * self.block_size
            raise too_long(Path(path), positions, slot_bytes / self.block_size) from None

    @property
    def info(self) -> EngineInfo:
        """See `ModelRunner.info`."""
        return self._info

    @property
    def block_size(self) -> int:
        """See `ModelRunner.block_size`: a whole context."""
        return self._config.max_position_embeddings

    @property
    def num_blocks(self) -> int:
        """See `ModelRunner.num_blocks`: slots."""
        return self._cache.num_slots

    def step(self, batch: Sequence[SequenceSlice]) -> ArrayLogits:
        """See `ModelRunner.step`."""
        logits_NV = np.empty((sum(slice_.num_logits for slice_ in batch), self._config.vocab_size), np.float32)
        first_rows = np.cumsum([0, *(slice_.num_logits for slice_ in batch)])
        for group in _groups(batch):
            slices = [batch[i] for i in group]
            rows = np.concatenate([np.arange(first_rows[i], first_rows[i + 1]) for i in group])
            logits_NV[rows] = self._run(_call(slices, self._cache.filled, self.block_size))
            for slice_ in slices:
                self._cache.filled[slice_.block_table[0]] = slice_.start + len(slice_.token_ids)
        return ArrayLogits(logits_NV)

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """See `ModelRunner.copy_blocks`."""
        for source, target in zip(sources, targets, strict=True):
            if isinstance(self._cache, HostSlotCache):
                self._cache.copy(source, target)
            else:
                self._copy_by_step(source, target)

    def _copy_by_step(self, source: int, target: int) -> None:
        """Copies a slot where only the graph can: by a step that reads the one and writes the other.

        Its token goes behind what the sequence has, where the next one will overwrite it.
        """
        start = self._cache.filled[source]
        binding = self._session.io_binding()
        self._cache.bind_past(binding, source, 1)
        self._cache.bind_present(binding, target, 1)
        nothing = np.zeros(0, np.int64)
        self._compute(binding, _Call(source, np.zeros((1, 1), np.int64), start[None], nothing))
        self._cache.filled[target] = start

    def _run(self, call: _Call) -> Floats:
        return self._compute(self._binding(call.first_slot, len(call.ids)), call)

    def _compute(self, binding: Any, call: _Call) -> Floats:
        inputs = call.inputs()
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        logits_RV = np.empty((len(inputs["logit_rows"]), self._config.vocab_size), np.float32)
        binding.bind_output("logits", "cpu", 0, np.float32, logits_RV.shape, logits_RV.ctypes.data)
        binding.synchronize_inputs()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return logits_RV[: len(call.logit_rows)]

    def _binding(self, first_slot: int, count: int) -> Any:
        """The cache of neighbouring slots, bound: made once, for the binding of so many arrays takes a while."""
        key = first_slot, count
        if key not in self._bindings:
            if len(self._bindings) == MOST_BINDINGS:
                self._bindings.clear()
            binding = self._session.io_binding()
            self._cache.bind_past(binding, *key)
            self._cache.bind_present(binding, *key)
            self._bindings[key] = binding
        return self._bindings[key]


@dataclass(frozen=True, slots=True)
class _Call:
    """What one run of the graph computes: B neighbouring slots from `first_slot` on, L tokens of each.

    Attributes:
        ids: [B, L].
        starts: the position of the first token of each slot, [B].
        logit_rows: which of the B * L tokens logits are wanted of.
    """

    first_slot: int
    ids: NDArray[np.int64]
    starts: NDArray[np.int64]
    logit_rows: NDArray[np.int64]

    def inputs(self) -> dict[str, NDArray[np.generic]]:
        """The graph's inputs by name, but for the cache."""
        length = self.ids.shape[1]
        last_B = self.starts + length - 1
        return {
            "input_ids": self.ids,
            "positions": self.starts[:, None] + np.arange(length),
            "last_position": last_B.astype(np.int32),
            "positions_seen": np.array(last_B.max() + 1, np.int32),
            # One row if none is wanted: ONNX Runtime 1.24 cannot broadcast over none.
            "logit_rows": self.logit_rows if len(self.logit_rows) else np.zeros(1, np.int64),
        }


def _groups(batch: Sequence[SequenceSlice]) -> list[list[int]]:
    """The slices that a call computes, by their places in the batch: rows that decode, by slot; prompts one by one."""
    decoding = sorted((int(slice_.block_table[0]), i) for i, slice_ in enumerate(batch) if len(slice_.token_ids) == 1)
    groups: list[list[int]] = []
    last_slot = -WIDEST_GAP - 2
    for slot, i in decoding:
        if slot - last_slot > WIDEST_GAP + 1:
            groups.append([])
        groups[-1].append(i)
        last_slot = slot
    return groups + [[i] for i, slice_ in enumerate(batch) if len(slice_.token_ids) > 1]


def _call(slices: Sequence[SequenceSlice], filled: NDArray[np.int64], context: int) -> _Call:
    """The call for one group, whose slices are in the order of their slots."""
    slots = [int(slice_.block_table[0]) for slice_ in slices]
    first, count, length = slots[0], slots[-1] - slots[0] + 1, len(slices[0].token_ids)
    ids_BL = np.zeros((count, length), np.int64)
    # A slot that is full belongs to no sequence that goes on; any place in it will do.
    starts_B = np.minimum(filled[first : first + count], context - 1)
    rows = []
    for slot, slice_ in zip(slots, slices, strict=True):
        ids_BL[slot - first], starts_B[slot - first] = slice_.token_ids, slice_.start
        end = (slot - first + 1) * length
        rows.append(np.arange(end - slice_.num_logits, end))
    return _Call(first, ids_BL, starts_B, np.concatenate(rows))
