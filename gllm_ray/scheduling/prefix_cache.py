"""Prompts that begin alike share the KV blocks of their common prefix."""

from hashlib import blake2b
from struct import Struct, pack
from typing import NamedTuple

from gllm_ray.scheduling.block_allocator import BlockAllocator
from gllm_ray.scheduling.sequence import Sequence


class PrefixHit(NamedTuple):
    """What the cache knows of a sequence that holds no block.

    Attributes:
        blocks: Those of its longest cached prefix, to share.
        last_block: One that holds all the rest of the tokens, to copy; None if there is none.
    """

    blocks: tuple[int, ...] = ()
    last_block: int | None = None


class PrefixCache:
    """Finds blocks that other sequences, or earlier lives of the same one, have computed.

    A block is known by a hash over its tokens, all tokens before them, and the request's
    `cache_salt`: requests of different salts never share. Full blocks are shared as they are.
    The block a prompt ends in is known by the tokens of the prompt, whatever its first owner
    writes behind them; who has the same prompt gets a copy to go on in. At least the last token
    is always computed, because its logits are what is sampled from.

    Args:
        allocator: Holds the blocks.
        is_enabled: False finds and publishes nothing.
    """

    def __init__(self, allocator: BlockAllocator, *, is_enabled: bool) -> None:
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self._allocator = allocator
        self._is_enabled = is_enabled
        self._pack = Struct(f"<{allocator.block_size}q").pack

    @property
    def computed_ratio(self) -> float:
        """Share of the tokens of admitted sequences that were not found, 0 to 1."""
        return 1 - self.num_hit_tokens / (self.num_queried_tokens or 1)

    def find(self, sequence: Sequence) -> PrefixHit:
        """What can be reused by a sequence that holds no block.

        Nothing, where the log probabilities of its prompt are still to be told.
        """
        if not self._is_enabled or sequence.prompt_logprobs is not None:
            return PrefixHit()
        blocks: list[int] = []
        for index in range((sequence.num_tokens - 1) // self._allocator.block_size):
            block = self._allocator.find(self._hash(sequence, index))
            if block is None:
                return PrefixHit(tuple(blocks))
            blocks.append(block)
        return PrefixHit(tuple(blocks), self._allocator.find(self._end_hash(sequence)))

    def reuse(self, sequence: Sequence, hit: PrefixHit) -> None:
        """Let a sequence start with what `find` returned, its tokens computed.

        The block to copy from is held, too; the caller releases it once the copy is on its way.
        """
        if not self._is_enabled:
            return
        self._allocator.share(hit.blocks)
        sequence.block_table = hit.blocks
        sequence.num_computed_tokens = len(hit.blocks) * self._allocator.block_size
        if hit.last_block is not None:
            self._allocator.share([hit.last_block])
            sequence.num_computed_tokens = sequence.num_tokens - 1
        self.num_queried_tokens += sequence.num_tokens
        self.num_hit_tokens += sequence.num_computed_tokens

    def publish(self, sequence: Sequence, start: int) -> None:
        """Let the blocks be found that what is scheduled of the sequence fills from `start` on.

        They can be shared at once, before the result is there: what is scheduled is neither
        preempted nor aborted, every stage runs micro-batches in the order of scheduling and
        writes the KV of a whole micro-batch before any of its rows attends to it. So a reader,
        even in the same micro-batch, comes after the write. A lost stage voids everything.
        """
        block_size = self._allocator.block_size
        first, end = start // block_size, sequence.num_computed_tokens // block_size
        if self._is_enabled and first < end:
            for index in range(first, end):
                self._allocator.publish(sequence.block_table[index], self._hash(sequence, index))

    def publish_end(self, sequence: Sequence) -> None:
        """Let the block be found that a prompt ends in, when all of it is scheduled."""
        if self._is_enabled and sequence.num_tokens % self._allocator.block_size:
            index = sequence.num_tokens // self._allocator.block_size
            self._allocator.publish(sequence.block_table[index], self._end_hash(sequence))

    def _end_hash(self, sequence: Sequence) -> bytes:
        """The hash of the block that the last token lies in, up to that token."""
        index = (sequence.num_tokens - 1) // self._allocator.block_size
        if (index + 1) * self._allocator.block_size == sequence.num_tokens:
            return self._hash(sequence, index)
        tokens = sequence.token_ids[index * self._allocator.block_size :]
        return _digest(self._hash(sequence, index - 1) + pack(f"<{len(tokens)}q", *tokens))

    def _hash(self, sequence: Sequence, index: int) -> bytes:
        """The hash of a full block, made once; that of block -1 is the salt's."""
        hashes = sequence.block_hashes
        if not hashes:
            salt = sequence.request.cache_salt.encode(errors="surrogatepass")
            # Another domain than the blocks', so that no salt can pass for a prefix.
            hashes.append(blake2b(salt, digest_size=32, person=b"cache_salt").digest())
        size = self._allocator.block_size
        while len(hashes) < index + 2:
            start = (len(hashes) - 1) * size
            tokens = sequence.token_ids[start : start + size]
            hashes.append(_digest(hashes[-1] + self._pack(*tokens)))
        return hashes[index + 1]


def _digest(content: bytes) -> bytes:
    return blake2b(content, digest_size=32).digest()
