"""Which KV blocks hold the positions of one sequence."""

from __future__ import annotations

from copy import copy

import numpy as np
from numpy.typing import NDArray

from runtime.engine.kv_cache import BlockPool
from runtime.engine.prefix_keys import PrefixKeys


class BlockTable:
    """The blocks that a sequence owns, some of them together with others."""

    def __init__(self, pool: BlockPool, capacity: int) -> None:
        """`capacity`: most positions that it will ever cover."""
        self._pool = pool
        self._blocks = np.zeros(pool.blocks_for(capacity), np.int32)
        self._count = 0
        self._filed = 0  # so many of the first blocks have been filed, or came from the files

    def __len__(self) -> int:
        """Blocks."""
        return self._count

    def array(self) -> NDArray[np.int32]:
        """The blocks, int32 [blocks], by position; a view."""
        return self._blocks[: self._count]

    def missing(self, positions: int) -> int:
        """How many blocks there are too few for so many positions."""
        return max(0, self._pool.blocks_for(positions) - self._count)

    def extend(self, positions: int) -> None:
        """Takes new blocks for so many positions in all; raises as `BlockPool.allocate`."""
        self._append(self._pool.allocate(self.missing(positions)))

    def find_prefix(self, keys: PrefixKeys, tokens: int) -> list[int]:
        """The filed blocks that hold the beginning of `tokens` tokens, all but the last of them at most."""
        found: list[int] = []
        for index in range((tokens - 1) // self._pool.block_size):
            block = self._pool.find(keys[index])
            if block is None:
                break
            found.append(block)
        return found

    def adopt(self, blocks: list[int]) -> int:
        """Begins an empty table with blocks that `find_prefix` found; returns the positions that they hold."""
        self._pool.share(blocks)
        self._append(blocks)
        self._filed = len(blocks)
        return len(blocks) * self._pool.block_size

    def file(self, keys: PrefixKeys, computed: int) -> None:
        """Makes the blocks findable that the first `computed` positions fill."""
        for index in range(self._filed, computed // self._pool.block_size):
            self._pool.file(int(self._blocks[index]), keys[index])
            self._filed = index + 1

    def shared(self, position: int) -> bool:
        """Whether somebody else reads the block of `position`, so that it must be copied before it is written."""
        index = position // self._pool.block_size
        return index < self._count and self._pool.owners(int(self._blocks[index])) > 1

    def replace(self, position: int) -> tuple[int, int]:
        """Puts a new block in place of that of `position`; returns the old and the new, to copy one to the other.

        Raises as `BlockPool.allocate`.
        """
        index = position // self._pool.block_size
        source = int(self._blocks[index])
        (target,) = self._pool.allocate(1)
        self._pool.release([source])
        self._blocks[index] = target
        return source, target

    def fork(self) -> BlockTable:
        """Another table of the same blocks."""
        self._pool.share(self.array().tolist())
        child = copy(self)
        child._blocks = self._blocks.copy()
        return child

    def release(self) -> None:
        """Gives all blocks back."""
        self._pool.release(self.array().tolist())
        self._count = self._filed = 0

    def _append(self, blocks: list[int]) -> None:
        end = self._count + len(blocks)
        self._blocks[self._count : end] = blocks
        self._count = end
