"""Who holds which KV block: integers only, the tensors are the stages' business."""

from collections import deque


class BlockAllocator:
    """Hands out block ids, first freed first reused, so that decisions repeat exactly.

    Args:
        num_blocks: Blocks every stage has; ids are 0 up to `num_blocks - 1`.
        block_size: Tokens a block holds.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = deque(range(num_blocks))
        self._is_used = [False] * num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks nobody holds."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold the KV of `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, num_blocks: int) -> list[int]:
        """Take blocks; the caller has checked that as many are free."""
        assert num_blocks <= len(self._free), "allocated more blocks than are free"
        blocks = [self._free.popleft() for _ in range(num_blocks)]
        for block in blocks:
            self._is_used[block] = True
        return blocks

    def release(self, blocks: list[int]) -> None:
        """Give blocks back."""
        for block in blocks:
            assert self._is_used[block], f"block {block} released twice"
            self._is_used[block] = False
        self._free.extend(blocks)
