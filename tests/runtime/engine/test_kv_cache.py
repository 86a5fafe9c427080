"""The block allocator: no block is lost, none has two owners."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.engine.kv_cache import BlockAllocator


@given(st.integers(1, 40), st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=60))
def test_blocks_are_conserved(num_blocks: int, actions: list[tuple[bool, int]]) -> None:
    allocator, owned = BlockAllocator(num_blocks, block_size=4), []
    for take, number in actions:
        held = [block for blocks in owned for block in blocks]
        if take and number > num_blocks - len(held):
            with pytest.raises(ValueError, match="are free"):
                allocator.allocate(number)
        elif take:
            owned.append(allocator.allocate(number))
            assert len(owned[-1]) == number
        elif owned:
            allocator.free(owned.pop(number % len(owned)))
        held = [block for blocks in owned for block in blocks]
        assert len(set(held)) == len(held)
        assert set(held) <= set(range(num_blocks))
        assert allocator.num_free == num_blocks - len(held)
        assert allocator.usage == len(held) / num_blocks
    for blocks in owned:
        allocator.free(blocks)
    assert sorted(allocator.allocate(num_blocks)) == list(range(num_blocks))


@pytest.mark.parametrize("wrong", [[0, 0], [3], [0, 3], [-1], [99]])
def test_freeing_what_is_not_in_use_frees_nothing(wrong: list[int]) -> None:
    allocator = BlockAllocator(4, block_size=4)
    assert set(allocator.allocate(3)) == {0, 1, 2}
    with pytest.raises(ValueError, match="not all in use"):
        allocator.free(wrong)
    assert allocator.num_free == 1


@pytest.mark.parametrize(("positions", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_blocks_for(positions: int, blocks: int) -> None:
    assert BlockAllocator(1, block_size=16).blocks_for(positions) == blocks


@pytest.mark.parametrize("shape", [(0, 16), (4, 0)])
def test_an_empty_cache_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="holds nothing"):
        BlockAllocator(*shape)
