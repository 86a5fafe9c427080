"""The native runner: a Llama in C++ (`runtime/native`), for the processor's own 4-bit kernels.

A checkpoint's matrices are read one at a time and repacked into panels that the kernels read; nothing else of the file
stays in memory. All else happens in `runtime.native._osp.Model`: one call a step, without the GIL.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quant.format import CheckpointReader, QuantizedLinear, QuantizedWeight, Tensor
from quant.hadamard import Hadamard, base_matrix
from quant.llama import CheckpointError, LlamaConfig
from quant.scheme import LINEAR_SITES
from runtime.engine.array_logits import ArrayLogits
from runtime.engine.base import EngineInfo
from runtime.engine.kv_capacity import default_num_blocks
from runtime.engine.native_library import KernelError, load_library
from runtime.engine.rotary import rotary_frequencies
from runtime.engine.runner import SequenceSlice, StepLogits

MAX_ROWS = 512
"""Tokens that one call of `Model.step` computes at most: what its activations take memory for."""


class NativeRunner:
    """Runs a checkpoint in any scheme, or in full precision. Implements `ModelRunner`.

    Integer sums are exact and hence those of the reference; floats are summed in the kernel's own fixed order. Keys
    and values of 16 bits are bfloat16.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int = 0,
        kernel: str = "",
        num_blocks: int | None = None,
        max_rows: int = MAX_ROWS,
    ) -> None:
        """Reads the checkpoint directory `path`.

        Args:
            threads: 0 for as many as the process may use (affinity mask and cgroup quota).
            kernel: the name of a kernel; empty for the best one that this processor runs.
            num_blocks: KV blocks of 16 positions; how many by default: see `default_num_blocks`.
            max_rows: most tokens that are computed at a time.

        Raises:
            CheckpointError: it is not a usable checkpoint, or there is not memory enough for one context.
            NativeLibraryError: the extension is not built, or does not load.
            KernelError: this processor runs no such kernel.
        """
        library = load_library()
        if kernel and kernel not in library.available_kernels():
            raise KernelError(
                f"no kernel {kernel!r} here; this processor runs: {', '.join(library.available_kernels())}"
            )
        reader = CheckpointReader(path)
        config, kv_bits = reader.config, reader.scheme.kv_bits if reader.scheme else 16
        self._block_size: int = library.BLOCK_SIZE
        if num_blocks is None:
            block_bytes = library.kv_block_bytes(
                config.num_hidden_layers, config.num_key_value_heads, config.head_dim, kv_bits
            )
            num_blocks = default_num_blocks(reader.path, config, block_bytes, self._block_size)
        self.num_blocks = num_blocks
        try:
            self._model = library.Model(
                **model_shape(config),
                kv_bits=kv_bits,
                kv_blocks=num_blocks,
                max_positions=min(config.max_position_embeddings, num_blocks * self._block_size),
                max_rows=max_rows,
                threads=threads,
                kernel=kernel,
            )
            _load(self._model, reader, kv_bits)
        except MemoryError:
            raise CheckpointError(
                reader.path, f"there is not memory enough for the model and {num_blocks * self._block_size} positions"
            ) from None
        precision = reader.scheme.label if reader.scheme else str(reader.norm("model.norm.weight").dtype)
        self._info = EngineInfo("native", precision, config.max_position_embeddings, config.vocab_size, self.kernel)

    @property
    def info(self) -> EngineInfo:
        """See `ModelRunner.info`."""
        return self._info

    @property
    def block_size(self) -> int:
        """See `ModelRunner.block_size`."""
        return self._block_size

    @property
    def kernel(self) -> str:
        """The name of the kernel that runs."""
        return str(self._model.kernel)

    @property
    def threads(self) -> int:
        """How many threads compute."""
        return int(self._model.threads)

    def step(self, batch: Sequence[SequenceSlice]) -> StepLogits:
        """See `ModelRunner.step`."""
        if sum(len(slice_.token_ids) for slice_ in batch) <= self._model.max_rows:
            run_step(self._model, batch, self._block_size)
            return NativeLogits(self._model)
        parts = []
        for part in _parts(batch, self._model.max_rows):
            run_step(self._model, part, self._block_size)
            parts.append(self._model.logits().copy())
        return ArrayLogits(np.concatenate(parts))

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """See `ModelRunner.copy_blocks`."""
        for source, target in zip(sources, targets, strict=True):
            self._model.copy_block(source, target)


class NativeLogits:
    """The logits of the model's last step, in its memory. Implements `StepLogits`."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __len__(self) -> int:
        return len(self._model.logits())

    def argmax(self) -> NDArray[np.int32]:
        """See `StepLogits.argmax`."""
        return np.array(self._model.argmax(), np.int32)

    def rows(self) -> NDArray[np.float32]:
        """See `StepLogits.rows`; a view, read-only."""
        view: NDArray[np.float32] = self._model.logits()
        return view


def run_step(model: Any, batch: Sequence[SequenceSlice], block_size: int) -> None:
    """Has a `runtime.native._osp.Model` compute a batch of at most `max_rows` tokens."""
    lengths = [len(slice_.token_ids) for slice_ in batch]
    tables = [
        slice_.block_table[: -(-(slice_.start + length) // block_size)]
        for slice_, length in zip(batch, lengths, strict=True)
    ]
    model.step(
        _joined([slice_.token_ids for slice_ in batch]),
        np.array([slice_.start for slice_ in batch], np.int32),
        np.array(lengths, np.int32),
        np.array([slice_.num_logits for slice_ in batch], np.int32),
        _joined(tables),
        np.array([len(table) for table in tables], np.int32),
    )


def model_shape(config: LlamaConfig) -> dict[str, Any]:
    """The sizes that `Model` is made with."""
    return {
        "vocabulary": config.vocab_size,
        "width": config.hidden_size,
        "inner": config.intermediate_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "norm_eps": config.rms_norm_eps,
    }


def _load(model: Any, reader: CheckpointReader, kv_bits: int) -> None:
    config = reader.config
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for site, module in LINEAR_SITES.items():
            _set_linear(model, layer, site, reader.linear(f"{prefix}.{module}"))
        norms = (_float32(reader.norm(f"{prefix}.{name}_layernorm.weight")) for name in ("input", "post_attention"))
        model.set_norms(layer, *norms)
    if not config.tie_word_embeddings:
        table = reader.embedding()
        model.set_embedding(**_stored(table))
    _set_linear(model, 0, "head", reader.head())
    model.set_final_norm(_float32(reader.norm("model.norm.weight")))
    model.set_rotary_frequencies(rotary_frequencies(config))
    if reader.scheme is not None and reader.scheme.hadamard != "none":
        model.set_ffn_hadamard(**hadamard_settings(config.intermediate_size))
    if kv_bits == 4:
        model.set_head_hadamard(**hadamard_settings(config.head_dim))
    model.check_weights()


def _set_linear(model: Any, layer: int, site: str, linear: Tensor | QuantizedLinear) -> None:
    weight: Tensor | QuantizedWeight = linear.weight if isinstance(linear, QuantizedLinear) else linear
    inputs: dict[str, Any] = {}
    if isinstance(linear, QuantizedLinear):
        scale = None if linear.input_scale is None else float(linear.input_scale)
        inputs = {"input_bits": linear.input_bits, "input_scale": scale, "rotated": linear.rotated}
    rows, columns = weight.shape
    model.set_linear(layer=layer, site=site, rows=rows, columns=columns, **_stored(weight), **inputs)


def _stored(weight: Tensor | QuantizedWeight) -> dict[str, Any]:
    """A matrix as `Model` takes it: its format, its values and its scales."""
    if isinstance(weight, QuantizedWeight):
        return {
            "format": f"int{weight.bits}",
            "values": np.ascontiguousarray(weight.stored),
            "scales": np.ascontiguousarray(weight.scale, np.float32),
        }
    if weight.dtype == ml_dtypes.bfloat16:
        return {"format": "bfloat16", "values": np.ascontiguousarray(weight).view(np.uint16)}
    return {"format": "float32", "values": _float32(weight)}  # float16 too, exactly


def hadamard_settings(width: int) -> dict[str, Any]:
    """`Hadamard.of_width(width)` as `Model` takes it."""
    transform = Hadamard.of_width(width)
    signs = base_matrix(transform.base)
    return {"blocks": transform.blocks, "base": transform.base, "power": transform.power, "signs": signs}


def _float32(tensor: Tensor) -> NDArray[np.float32]:
    return np.ascontiguousarray(tensor, np.float32)


def _joined(arrays: Sequence[NDArray[np.int32]]) -> NDArray[np.int32]:
    return np.ascontiguousarray(arrays[0] if len(arrays) == 1 else np.concatenate(arrays), np.int32)


def _parts(batch: Sequence[SequenceSlice], most: int) -> Iterator[list[SequenceSlice]]:
    """The batch in parts of at most `most` tokens; a slice may lie in several, which changes no bit."""
    part: list[SequenceSlice] = []
    room = most
    for slice_ in batch:
        done, length = 0, len(slice_.token_ids)
        while done < length:
            take = min(room, length - done)
            wanted = max(0, done + take - (length - slice_.num_logits))
            part.append(
                SequenceSlice(
                    slice_.token_ids[done : done + take], slice_.start + done, slice_.block_table, min(wanted, take)
                )
            )
            done, room = done + take, room - take
            if room == 0:
                yield part
                part, room = [], most
    if part:
        yield part
