import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_ray.scheduling.block_allocator import BlockAllocator


@given(st.lists(st.integers(0, 5), max_size=30))
def test_used_and_free_blocks_are_conserved(sizes):
    allocator = BlockAllocator(num_blocks=12, block_size=4)
    held = []
    for size in sizes:
        if size <= allocator.num_free_blocks and size > 0:
            held.append(allocator.allocate(size))
        elif held:
            allocator.release(held.pop(0))
        used = sum(len(blocks) for blocks in held)
        assert used + allocator.num_free_blocks == 12
        assert len({block for blocks in held for block in blocks}) == used


def test_a_block_released_twice_is_an_error():
    allocator = BlockAllocator(num_blocks=2, block_size=4)
    blocks = allocator.allocate(1)
    allocator.release(blocks)
    with pytest.raises(AssertionError, match="twice"):
        allocator.release(blocks)


def test_a_partly_filled_block_counts_whole():
    allocator = BlockAllocator(num_blocks=2, block_size=4)
    assert [allocator.blocks_for(n) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
