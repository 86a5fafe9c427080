"""Who owns which block of the KV cache, and what the blocks hold. The keys and values belong to the `ModelRunner`.

The cache is cut into blocks of `block_size` positions. A sequence's positions need not lie side by side: its block
table says which block holds them. Any free block serves any sequence, so the cache cannot fragment.

A block may have several owners, all of whom only read it. A block that is full may be filed under a key that stands
for all tokens up to its end (see `runtime.engine.prefix_keys`). When its last owner lets go, it is free, yet stays
findable until it is handed out anew; of such blocks the one that was let go first is handed out first.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Hands out the block ids 0 … num_blocks-1."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a KV cache of {num_blocks} blocks of {block_size} positions holds nothing")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._owners = [0] * num_blocks
        # Free blocks without a key: a stack, whose top may still be warm in the processor's cache.
        self._blank = list(reversed(range(num_blocks)))
        # Free blocks with a key, the one let go longest ago first.
        self._remembered: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody owns, those with a key too."""
        return len(self._blank) + len(self._remembered)

    @property
    def usage(self) -> float:
        """The share of blocks that have an owner, 0 to 1."""
        return (self.num_blocks - self.num_free) / self.num_blocks

    def blocks_for(self, positions: int) -> int:
        """How many blocks hold so many positions."""
        return -(-positions // self.block_size)

    def owners(self, block: int) -> int:
        """How many own a block."""
        return self._owners[block]

    def allocate(self, count: int) -> list[int]:
        """Takes `count` free blocks, which thereby lose their keys.

        Raises:
            ValueError: fewer are free; none is taken then.
        """
        if count > self.num_free:
            raise ValueError(f"{count} KV blocks wanted, {self.num_free} of {self.num_blocks} are free")
        blocks = [self._blank.pop() if self._blank else self._forget_oldest() for _ in range(count)]
        for block in blocks:
            self._owners[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Adds an owner to each block; revives those that are free and have a key.

        Raises:
            ValueError: a block holds nothing to share: it is free and has no key. None is shared then.
        """
        shared = list(blocks)
        if any(not self._owners[block] and block not in self._remembered for block in shared):
            raise ValueError(f"KV blocks {shared} do not all hold something")
        for block in shared:
            self._remembered.pop(block, None)
            self._owners[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Takes an owner from each block. The blocks of a prefix go first to last: of it, the end is forgotten first.

        Raises:
            ValueError: a block has fewer owners than that; none is released then.
        """
        counts = Counter(blocks)
        if any(not 0 <= block < self.num_blocks or self._owners[block] < count for block, count in counts.items()):
            raise ValueError(f"KV blocks {list(blocks)} are not all in use so many times")
        for block in reversed(blocks):
            self._owners[block] -= 1
            if self._owners[block]:
                continue
            if block in self._key_of:
                self._remembered[block] = None
            else:
                self._blank.append(block)

    def file(self, block: int, key: bytes) -> None:
        """Makes a full block findable by `key`. Where another block is filed under it already, that one stays."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def find(self, key: bytes) -> int | None:
        """The block that is filed under `key`."""
        return self._block_of.get(key)

    def _forget_oldest(self) -> int:
        block, _ = self._remembered.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block
