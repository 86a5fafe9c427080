"""Who owns which block of the KV cache. The keys and values themselves belong to the `ModelRunner`.

The cache is cut into blocks of `block_size` positions. A sequence's positions need not lie side by side: its block
table says which block holds them. Any free block serves any sequence, so the cache cannot fragment.
"""

from __future__ import annotations

from collections.abc import Iterable


class BlockAllocator:
    """Hands out the block ids 0 … num_blocks-1, each to one owner at a time."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a KV cache of {num_blocks} blocks of {block_size} positions holds nothing")
        self.num_blocks = num_blocks
        self.block_size = block_size
        # A stack: the block freed last is handed out first, while it may still be warm in the processor's cache.
        self._free = list(reversed(range(num_blocks)))
        self._taken: set[int] = set()

    @property
    def num_free(self) -> int:
        """Blocks that nobody owns."""
        return len(self._free)

    @property
    def usage(self) -> float:
        """The share of blocks in use, 0 to 1."""
        return len(self._taken) / self.num_blocks

    def blocks_for(self, positions: int) -> int:
        """How many blocks hold so many positions."""
        return -(-positions // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks.

        Raises:
            ValueError: fewer are free; none is taken then.
        """
        if count > len(self._free):
            raise ValueError(f"{count} KV blocks wanted, {len(self._free)} of {self.num_blocks} are free")
        blocks = [self._free.pop() for _ in range(count)]
        self._taken.update(blocks)
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        """Gives blocks back.

        Raises:
            ValueError: a block is not in use, or is named twice; none is freed then.
        """
        returned = list(blocks)
        if len(set(returned)) != len(returned) or not self._taken.issuperset(returned):
            raise ValueError(f"KV blocks {returned} are not all in use, once each")
        self._taken.difference_update(returned)
        self._free.extend(reversed(returned))
