"""The contract of what computes logits: `ModelRunner`, which every local engine has under its `LocalEngine`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.engine.base import EngineInfo


@dataclass(frozen=True, slots=True)
class SequenceSlice:
    """A run of consecutive tokens of one sequence, to be computed in one step.

    Attributes:
        token_ids: int32 [L], L >= 1.
        start: position of `token_ids[0]`. The keys and values of positions 0 … start-1 are in the cache.
        block_table: int32 [blocks]; position p lives in block `block_table[p // block_size]`, row `p % block_size`.
            Covers at least the positions 0 … start+L-1.
        num_logits: logits are wanted for this many of the last tokens: 0 for a prefill chunk that is not the
            last, 1 to sample the next token, L to score a prompt.
    """

    token_ids: NDArray[np.int32]
    start: int
    block_table: NDArray[np.int32]
    num_logits: int = 1


class StepLogits(Protocol):
    """The logits of a step, [rows, V], wherever they lie; valid until the next step. In numpy: `ArrayLogits`."""

    def __len__(self) -> int: ...

    def argmax(self) -> NDArray[np.int32]:
        """The token of the highest logit of each row, the lowest id among equals, int32 [rows].

        -1 for a row that holds a NaN or whose maximum is infinite.
        """
        ...

    def rows(self) -> NDArray[np.float32]:
        """The logits, float32 [rows, V], C-contiguous; perhaps a view of the runner's memory: not to be written to."""
        ...


class ModelRunner(Protocol):
    """Computes logits over a paged KV cache that it owns. Not thread-safe: one caller at a time.

    A row of logits depends on its own sequence's tokens only: bit for bit the same alone, in any batch and for
    any cutting of its tokens into slices.
    """

    @property
    def info(self) -> EngineInfo: ...

    @property
    def block_size(self) -> int:
        """Positions in a KV block."""
        ...

    @property
    def num_blocks(self) -> int:
        """KV blocks in the cache; block ids are 0 … num_blocks-1."""
        ...

    def step(self, batch: Sequence[SequenceSlice]) -> StepLogits:
        """Writes the slices' keys and values; returns sum of `num_logits` rows of logits, in batch order.

        Where all sequences are plainly greedy, only `StepLogits.argmax` is asked for: an engine need not copy logits.
        """
        ...

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies whole KV blocks in every layer, `sources[i]` to `targets[i]`, i in order.

        The targets differ from each other, and none is the source of a later pair; so reading all sources first does
        the same.
        """
        ...
