"""The block pool: no block is lost, none is handed out while it has an owner, what is remembered is found."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from runtime.engine.kv_cache import BlockPool

NUM_BLOCKS = 7


class PoolBesideAModel(RuleBasedStateMachine):
    """The pool, and a model of it that is written without regard to speed."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, block_size=4)
        self.owned: list[list[int]] = []  # one entry an owner
        self.keys: dict[int, bytes] = {}  # of blocks
        self.let_go: list[int] = []  # free blocks with a key, in the order in which they were let go
        self.next_key = 0

    @property
    def owners(self) -> Counter[int]:
        return Counter(block for blocks in self.owned for block in blocks)

    @rule(count=st.integers(0, NUM_BLOCKS))
    def allocate(self, count: int) -> None:
        blank = NUM_BLOCKS - len(self.owners) - len(self.let_go)
        if count > blank + len(self.let_go):
            with pytest.raises(ValueError, match="are free"):
                self.pool.allocate(count)
            return
        blocks = self.pool.allocate(count)
        forgotten = self.let_go[: max(0, count - blank)]
        assert len(set(blocks)) == count
        assert not set(blocks) & set(self.owners)
        assert set(blocks) & set(self.let_go) == set(forgotten), "the first let go are the first forgotten"
        for block in forgotten:
            assert self.pool.find(self.keys.pop(block)) is None
            self.let_go.remove(block)
        self.owned.append(blocks)

    @rule(which=st.integers(0, 99))
    def release(self, which: int) -> None:
        if self.owned:
            blocks = self.owned.pop(which % len(self.owned))
            self.pool.release(blocks)
            self.let_go += [block for block in reversed(blocks) if block in self.keys and not self.owners[block]]

    @rule(which=st.integers(0, 99))
    def fork(self, which: int) -> None:
        if self.owned:
            blocks = list(self.owned[which % len(self.owned)])
            self.pool.share(blocks)
            self.owned.append(blocks)

    @rule(which=st.integers(0, 99))
    def file(self, which: int) -> None:
        blocks = sorted(self.owners)
        if blocks:
            block = blocks[which % len(blocks)]
            key = b"%d" % self.next_key
            self.pool.file(block, key)
            if block not in self.keys:
                self.keys[block] = key
                self.next_key += 1

    @rule(which=st.integers(0, 99))
    def revive(self, which: int) -> None:
        if self.keys:
            block = sorted(self.keys)[which % len(self.keys)]
            found = self.pool.find(self.keys[block])
            assert found == block
            self.pool.share([block])
            self.owned.append([block])
            if block in self.let_go:
                self.let_go.remove(block)

    @invariant()
    def agree(self) -> None:
        assert self.pool.num_free == NUM_BLOCKS - len(self.owners)
        assert self.pool.usage == pytest.approx(len(self.owners) / NUM_BLOCKS)
        assert [self.pool.owners(block) for block in range(NUM_BLOCKS)] == [self.owners[i] for i in range(NUM_BLOCKS)]
        for block, key in self.keys.items():
            assert self.pool.find(key) == block


TestPoolBesideAModel = PoolBesideAModel.TestCase
TestPoolBesideAModel.settings = settings(max_examples=50, stateful_step_count=30)


def test_a_key_belongs_to_the_first_block() -> None:
    pool = BlockPool(3, block_size=4)
    first, second = pool.allocate(2)
    pool.file(first, b"k")
    pool.file(second, b"k")
    assert pool.find(b"k") == first
    pool.release([first, second])
    assert pool.num_free == 3
    assert set(pool.allocate(2)) == {second, 2}, "what is remembered is handed out last"
    assert pool.find(b"k") == first


@pytest.mark.parametrize("wrong", [[0, 0], [3], [0, 3], [-1], [99]])
def test_releasing_what_is_not_in_use_releases_nothing(wrong: list[int]) -> None:
    pool = BlockPool(4, block_size=4)
    assert set(pool.allocate(3)) == {0, 1, 2}
    with pytest.raises(ValueError, match="not all in use"):
        pool.release(wrong)
    assert pool.num_free == 1


def test_a_blank_block_cannot_be_shared() -> None:
    pool = BlockPool(4, block_size=4)
    (block,) = pool.allocate(1)
    with pytest.raises(ValueError, match="do not all hold something"):
        pool.share([block, 3])
    pool.release([block])
    assert pool.num_free == 4


@given(st.integers(0, 1000), st.integers(1, 50))
def test_blocks_for(positions: int, block_size: int) -> None:
    blocks = BlockPool(1, block_size).blocks_for(positions)
    assert (blocks - 1) * block_size < positions <= blocks * block_size or blocks == positions == 0


@pytest.mark.parametrize("shape", [(0, 16), (4, 0)])
def test_an_empty_cache_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="holds nothing"):
        BlockPool(*shape)
