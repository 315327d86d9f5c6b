"""Which micro-batches a profile measures, and the micro-batches themselves."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest
from typing import TypeVar

from gllm_ray.messages import MicroBatch, SamplingParams, ScheduledSequence
from gllm_ray.scheduling.load import StepLoad

_CONTEXTS = (32, 256, 2048, 16_384, 131_072)  # and the longest that the model serves
_GREEDY = SamplingParams()

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineLimits:
    """The largest micro-batch that a pipeline takes.

    Attributes:
        max_decodes: Decodes.
        max_batch_tokens: Decodes and prefill tokens together.
        max_model_len: Tokens of a sequence.
        num_blocks: KV blocks.
        block_size: Tokens of a block.
    """

    max_decodes: int
    max_batch_tokens: int
    max_model_len: int
    num_blocks: int
    block_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfilePoint:
    """A micro-batch to measure: decodes that are equal, and chunks of equal length.

    Attributes:
        num_decodes: Decodes.
        context: Tokens that each of them reads, its own included.
        chunks: Tokens of each prefill chunk.
        chunk_start: Position at which each of them starts.
    """

    num_decodes: int = 0
    context: int = 1
    chunks: tuple[int, ...] = ()
    chunk_start: int = 0

    @property
    def load(self) -> StepLoad:
        """What the stages compute."""
        return StepLoad(
            self.num_decodes,
            self.num_decodes * self.context,
            sum(self.chunks),
            sum(chunk * (self.chunk_start + chunk) for chunk in self.chunks),
        )

    def batch(self, batch_id: int, block_size: int) -> MicroBatch:
        """The micro-batch, each sequence with blocks of its own; every one draws a token."""
        spans = [(self.context - 1, 1)] * self.num_decodes
        spans += [(self.chunk_start, chunk) for chunk in self.chunks]
        sequences, num_blocks = [], 0
        for seq_id, (start, length) in enumerate(spans):
            first_block, num_blocks = num_blocks, num_blocks - (-(start + length) // block_size)
            sequences.append(
                ScheduledSequence(
                    seq_id=seq_id,
                    epoch=0,
                    start=start,
                    token_ids=(0,) * length,
                    block_table=tuple(range(first_block, num_blocks)),
                    sampling=_GREEDY,
                )
            )
        return MicroBatch(batch_id=batch_id, sequences=tuple(sequences))

    def num_blocks(self, block_size: int) -> int:
        """KV blocks that the sequences take."""
        chunks = sum(-(-(self.chunk_start + chunk) // block_size) for chunk in self.chunks)
        return self.num_decodes * -(-self.context // block_size) + chunks


def profile_grid(limits: PipelineLimits) -> list[ProfilePoint]:
    """Decodes at several contexts, prefill chunks at several positions, and mixes of both.

    Numbers of rows are powers of two and the largest. Each number comes once before any comes
    again, from coarse to fine, so that a grid that is cut short spans the same range. What does
    not fit the KV cache cannot happen, and is left out.
    """
    points = [*_decodes(limits), *_prefills(limits), *_mixes(limits)]
    fitting = {p: None for p in points if p.num_blocks(limits.block_size) <= limits.num_blocks}
    by_rows = sorted(fitting, key=_num_rows)
    groups = [list(group) for _, group in groupby(by_rows, key=_num_rows)]
    rounds = zip_longest(*_coarse_to_fine(groups))
    return [point for points in rounds for point in points if point is not None]


def _num_rows(point: ProfilePoint) -> int:
    return point.load.num_tokens


def _decodes(limits: PipelineLimits) -> Iterator[ProfilePoint]:
    for num_decodes in _sizes(min(limits.max_decodes, limits.max_batch_tokens)):
        for context in _contexts(limits):
            yield ProfilePoint(num_decodes=num_decodes, context=context)


def _prefills(limits: PipelineLimits) -> Iterator[ProfilePoint]:
    longest = limits.max_model_len
    for num_tokens in _sizes(limits.max_batch_tokens):
        latest = max(0, longest - num_tokens)
        for start in dict.fromkeys((0, latest // 2, latest)):
            yield ProfilePoint(chunks=_cut(num_tokens, longest), chunk_start=start)


def _mixes(limits: PipelineLimits) -> Iterator[ProfilePoint]:
    contexts = _contexts(limits)
    context = contexts[len(contexts) // 2]
    for num_decodes in _sizes(limits.max_decodes)[2::2]:
        for num_tokens in _sizes(limits.max_batch_tokens - num_decodes)[4::2]:
            chunks = _cut(num_tokens, limits.max_model_len)
            yield ProfilePoint(num_decodes=num_decodes, context=context, chunks=chunks)


def _cut(num_tokens: int, longest: int) -> tuple[int, ...]:
    """Chunks of at most the longest."""
    num_whole, rest = divmod(num_tokens, longest)
    return (longest,) * num_whole + ((rest,) if rest else ())


def _contexts(limits: PipelineLimits) -> list[int]:
    longest = limits.max_model_len
    return [*(context for context in _CONTEXTS if context < longest), longest]


def _sizes(largest: int) -> list[int]:
    """Powers of two up to the largest, and the largest; none if it is below 1."""
    if largest < 1:
        return []
    return [*(1 << power for power in range((largest - 1).bit_length())), largest]


def _coarse_to_fine(items: Sequence[T]) -> Iterable[T]:
    """Both ends, then the middle, then the middles of what is between."""
    order = dict.fromkeys((0, len(items) - 1))
    spans = deque([(0, len(items) - 1)])
    while spans:
        low, high = spans.popleft()
        middle = (low + high) // 2
        if low < middle:
            order[middle] = None
            spans += [(low, middle), (middle, high)]
    return [items[index] for index in order]
