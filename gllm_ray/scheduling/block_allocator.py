"""Who holds which KV block: integers only, the tensors are the stages' business."""

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence


class BlockAllocator:
    """Counts the references to each block, and finds unreferenced content again.

    A block is used (referenced, by several sequences if they share it), free (unreferenced, its
    content is void), or cached (unreferenced, and its content can be found by its hash). The
    three add up to `num_blocks`. The first freed is reused first, so that decisions repeat
    exactly; a cached block is evicted only when none is free, the least recently used first.

    Args:
        num_blocks: Blocks every stage has; ids are 0 up to `num_blocks - 1`.
        block_size: Tokens a block holds.

    Attributes:
        num_published: How often content became one that can be found.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_published = 0
        # Of the blocks that were ever taken, which are the first ones: a thousand simulated
        # schedulers fit into memory.
        self._num_references: list[int] = []
        self._free: deque[int] = deque()  # those of them that are
        # In the order of eviction. Taking the first of a plain dict searches all that were taken.
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._blocks: dict[bytes, int] = {}  # used and cached ones, by the hash of their content
        self._hashes: dict[int, list[bytes]] = {}  # its inverse

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be allocated: free ones, and cached ones that would be evicted."""
        num_fresh = self.num_blocks - len(self._num_references)
        return num_fresh + len(self._free) + len(self._cached)

    @property
    def utilization(self) -> float:
        """Share of the blocks in use, 0 to 1; blocks that are only cached are not."""
        return 1 - self.num_free_blocks / self.num_blocks

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold the KV of `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def num_cached(self, blocks: Iterable[int]) -> int:
        """How many of the blocks are unreferenced, so that sharing them takes from the free."""
        return sum(block in self._cached for block in blocks)

    def allocate(self, num_blocks: int) -> tuple[int, ...]:
        """Take blocks of void content; the caller has checked that as many are free."""
        assert num_blocks <= self.num_free_blocks, "allocated more blocks than are free"
        return tuple([self._take() for _ in range(num_blocks)])

    def share(self, blocks: Iterable[int]) -> None:
        """Add a reference to blocks that `find` returned."""
        for block in blocks:
            assert block in self._hashes, f"block {block} has no content to share"
            self._cached.pop(block, None)
            self._num_references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each block of a sequence, given in the order of positions."""
        # Last position first: a block is of no use without those before it, so it is evicted first.
        for block in reversed(blocks):
            assert self._num_references[block] > 0, f"block {block} released twice"
            self._num_references[block] -= 1
            if self._num_references[block]:
                continue
            if block in self._hashes:
                self._cached[block] = None
            else:
                self._free.append(block)

    def publish(self, block: int, content: bytes) -> None:
        """Let a used block be found by the hash of its content, or of its first tokens.

        Of several blocks with the same content the first stays the one that is found.
        """
        assert self._num_references[block] > 0, f"block {block} published, but not held"
        if content not in self._blocks:
            self.num_published += 1
            self._blocks[content] = block
            self._hashes.setdefault(block, []).append(content)

    def find(self, content: bytes) -> int | None:
        """The block that holds the content, used or cached."""
        return self._blocks.get(content)

    def forget_contents(self) -> None:
        """Find nothing any more: the stages' KV is gone."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._hashes.clear()
        self._blocks.clear()

    def _take(self) -> int:
        block = len(self._num_references)
        if block < self.num_blocks:
            self._num_references.append(1)
            return block
        if self._free:
            block = self._free.popleft()
        else:
            block, _ = self._cached.popitem(last=False)
            for content in self._hashes.pop(block):
                del self._blocks[content]
        self._num_references[block] = 1
        return block
