import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_ray.scheduling.block_allocator import BlockAllocator


def publish(allocator, blocks, name):
    for index, block in enumerate(blocks):
        allocator.publish(block, content(name, index))


def content(name, index):
    return f"{name}{index}".encode()


# A size allocates as many blocks and publishes some of them; a name shares its first block.
@given(st.lists(st.one_of(st.integers(0, 5), st.sampled_from("ab")), max_size=40))
def test_used_free_and_cached_blocks_are_conserved(todo):
    allocator = BlockAllocator(num_blocks=12, block_size=4)
    held = []
    for action in todo:
        if isinstance(action, str):
            block = allocator.find(content(action, 0))
            if block is not None:
                allocator.share([block])
                held.append([block])
        elif 0 < action <= allocator.num_free_blocks:
            held.append(allocator.allocate(action))
            publish(allocator, held[-1][: action - 1], "ab"[action % 2])
        elif held:
            allocator.release(held.pop(0))
        used = [block for blocks in held for block in blocks]
        assert len(set(used)) + allocator.num_free_blocks == 12
        references = allocator._num_references  # of the blocks that were ever taken
        assert [used.count(block) for block in range(len(references))] == references
        assert all(block < len(references) for block in used)


def test_a_shared_block_is_used_until_its_last_reference_is_released():
    allocator = BlockAllocator(num_blocks=2, block_size=4)
    blocks = allocator.allocate(1)
    publish(allocator, blocks, "a")
    allocator.share(blocks)
    allocator.release(blocks)
    assert allocator.num_free_blocks == 1
    allocator.release(blocks)
    assert allocator.num_free_blocks == 2
    with pytest.raises(AssertionError, match="twice"):
        allocator.release(blocks)


def test_cached_blocks_are_evicted_only_when_none_is_free():
    allocator = BlockAllocator(num_blocks=4, block_size=4)
    cached = allocator.allocate(2)
    publish(allocator, cached, "a")
    allocator.release(cached)
    others = allocator.allocate(2)
    assert not set(others) & set(cached)
    assert tuple(allocator.find(content("a", i)) for i in range(2)) == cached
    assert set(allocator.allocate(2)) == set(cached)
    assert [allocator.find(content("a", i)) for i in range(2)] == [None, None]


def test_the_least_recently_used_is_evicted_first_and_of_one_sequence_the_last_block():
    allocator = BlockAllocator(num_blocks=6, block_size=4)
    tables = {name: allocator.allocate(2) for name in "abc"}
    for name, blocks in tables.items():
        publish(allocator, blocks, name)
        allocator.release(blocks)
    allocator.share(tables["a"])  # used again
    allocator.release(tables["a"])
    assert allocator.allocate(6) == (
        *reversed(tables["b"]),
        *reversed(tables["c"]),
        *reversed(tables["a"]),
    )


def test_content_is_found_in_the_block_that_had_it_first():
    allocator = BlockAllocator(num_blocks=2, block_size=4)
    first, second = allocator.allocate(2)
    publish(allocator, [first], "a")
    publish(allocator, [second], "a")
    allocator.release([second])
    assert allocator.find(content("a", 0)) == first
    assert allocator.allocate(1) == (second,)  # free, not cached
    assert allocator.find(content("a", 0)) == first


def test_an_evicted_block_is_found_by_none_of_its_contents():
    allocator = BlockAllocator(num_blocks=1, block_size=4)
    block = allocator.allocate(1)
    publish(allocator, block, "a")  # its first tokens
    publish(allocator, block, "b")  # all of them
    assert allocator.find(content("a", 0)) == allocator.find(content("b", 0)) == block[0]
    allocator.release(block)
    allocator.allocate(1)
    assert allocator.find(content("a", 0)) is allocator.find(content("b", 0)) is None


def test_forgotten_contents_are_not_found_and_their_blocks_are_free():
    allocator = BlockAllocator(num_blocks=3, block_size=4)
    used, cached = allocator.allocate(2)
    publish(allocator, [used, cached], "a")
    allocator.release([cached])
    allocator.forget_contents()
    assert [allocator.find(content("a", i)) for i in range(2)] == [None, None]
    assert allocator.num_free_blocks == 2
    allocator.release([used])
    assert sorted(allocator.allocate(3)) == [0, 1, 2]


def test_content_that_is_not_there_cannot_be_shared():
    allocator = BlockAllocator(num_blocks=1, block_size=4)
    with pytest.raises(AssertionError, match="no content"):
        allocator.share(allocator.allocate(1))


def test_a_block_released_twice_is_an_error():
    allocator = BlockAllocator(num_blocks=2, block_size=4)
    blocks = allocator.allocate(1)
    allocator.release(blocks)
    with pytest.raises(AssertionError, match="twice"):
        allocator.release(blocks)


def test_a_partly_filled_block_counts_whole():
    allocator = BlockAllocator(num_blocks=2, block_size=4)
    assert [allocator.blocks_for(n) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
