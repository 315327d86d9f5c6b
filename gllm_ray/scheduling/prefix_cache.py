"""Prompts that begin alike share the KV blocks of their common prefix."""

from hashlib import blake2b
from struct import Struct

from gllm_ray.messages import ScheduledSequence
from gllm_ray.scheduling.block_allocator import BlockAllocator
from gllm_ray.scheduling.sequence import Sequence


class PrefixCache:
    """Finds blocks that other sequences, or earlier lives of the same one, have computed.

    A block is known by a hash over its tokens, all tokens before them, and the request's
    `cache_salt`: requests of different salts never share. Only full blocks are shared, and at
    least the last token is always computed, because its logits are what is sampled from. So a
    full hit computes one token, or one whole block if the prompt ends with a block: computing
    only its last token would write to a block that others read, where a batch of another shape
    may round differently.

    Args:
        allocator: Holds the blocks.
        is_enabled: False finds and publishes nothing.
    """

    def __init__(self, allocator: BlockAllocator, *, is_enabled: bool) -> None:
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self._allocator = allocator
        self._is_enabled = is_enabled
        self._packed_block = Struct(f"<{allocator.block_size}q")

    def find(self, sequence: Sequence) -> list[int]:
        """The blocks of the longest cached prefix of a sequence that holds none."""
        blocks: list[int] = []
        if not self._is_enabled:
            return blocks
        for index in range((len(sequence.token_ids) - 1) // self._allocator.block_size):
            block = self._allocator.find(self._hash(sequence, index))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def reuse(self, sequence: Sequence, blocks: list[int]) -> None:
        """Let a sequence start with the blocks that `find` returned, their tokens computed."""
        if not self._is_enabled:
            return
        self._allocator.share(blocks)
        sequence.block_table = blocks
        sequence.num_computed_tokens = len(blocks) * self._allocator.block_size
        self.num_queried_tokens += len(sequence.token_ids)
        self.num_hit_tokens += sequence.num_computed_tokens

    def publish(self, sequence: Sequence, item: ScheduledSequence) -> None:
        """Let the blocks be found that a scheduled share of the sequence fills.

        They can be shared at once, before the result is there: what is scheduled is neither
        preempted nor aborted, every stage runs micro-batches in the order of scheduling and
        writes the KV of a whole micro-batch before any of its rows attends to it. So a reader,
        even in the same micro-batch, comes after the write. A lost stage voids everything.
        """
        if not self._is_enabled:
            return
        block_size = self._allocator.block_size
        for index in range(item.start // block_size, item.end // block_size):
            self._allocator.publish(sequence.block_table[index], self._hash(sequence, index))

    def _hash(self, sequence: Sequence, index: int) -> bytes:
        """The hash of a full block, made once; equal on every machine."""
        hashes = sequence.block_hashes
        if not hashes:
            salt = sequence.request.cache_salt.encode(errors="surrogatepass")
            # Another domain than the blocks', so that no salt can pass for a prefix.
            hashes.append(blake2b(salt, digest_size=32, person=b"cache_salt").digest())
        size = self._allocator.block_size
        while len(hashes) < index + 2:
            start = (len(hashes) - 1) * size
            tokens = self._packed_block.pack(*sequence.token_ids[start : start + size])
            hashes.append(blake2b(hashes[-1] + tokens, digest_size=32).digest())
        return hashes[index + 1]
