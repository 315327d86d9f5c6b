"""Which micro-batches a profile measures, and the micro-batches themselves."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest
from typing import NamedTuple, TypeVar

from gllm_ray.messages import MicroBatch, SamplingParams, ScheduledSequence
from gllm_ray.scheduling.load import StepLoad

_CONTEXTS = (32, 256, 2048, 16_384, 131_072)  # and the longest that the model serves
_NUM_CHUNKS = 4
_SHORTEST_CHUNK = 16  # of several
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


class Span(NamedTuple):
    """The tokens of a sequence that a micro-batch computes."""

    start: int
    length: int

    @property
    def end(self) -> int:
        """The position after the last."""
        return self.start + self.length


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfilePoint:
    """A micro-batch to measure.

    Attributes:
        decodes: One token each.
        chunks: Prefill chunks.
    """

    decodes: tuple[Span, ...] = ()
    chunks: tuple[Span, ...] = ()

    @property
    def load(self) -> StepLoad:
        """What the stages compute."""
        return StepLoad(
            len(self.decodes),
            sum(decode.end for decode in self.decodes),
            sum(chunk.length for chunk in self.chunks),
            sum(chunk.length * chunk.end for chunk in self.chunks),
        )

    def batch(self, batch_id: int, block_size: int) -> MicroBatch:
        """The micro-batch, each sequence with blocks of its own; every one draws a token."""
        sequences, num_blocks = [], 0
        for seq_id, span in enumerate(self.decodes + self.chunks):
            first_block, num_blocks = num_blocks, num_blocks - (-span.end // block_size)
            sequences.append(
                ScheduledSequence(
                    seq_id=seq_id,
                    epoch=0,
                    start=span.start,
                    token_ids=(0,) * span.length,
                    block_table=tuple(range(first_block, num_blocks)),
                    sampling=_GREEDY,
                )
            )
        return MicroBatch(batch_id=batch_id, sequences=tuple(sequences))

    def num_blocks(self, block_size: int) -> int:
        """KV blocks that the sequences take."""
        return sum(-(-span.end // block_size) for span in self.decodes + self.chunks)


def profile_grid(limits: PipelineLimits) -> list[ProfilePoint]:
    """Decodes of several contexts, prefill in one chunk and in several, and mixes of both.

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
        for longest in _contexts(limits):
            yield ProfilePoint(decodes=_spread(num_decodes, longest))


def _prefills(limits: PipelineLimits) -> Iterator[ProfilePoint]:
    longest = limits.max_model_len
    for num_tokens in _sizes(limits.max_batch_tokens):
        latest = max(0, longest - num_tokens)
        for chunks in (
            _cut(num_tokens, longest, num_chunks=1),
            _several(num_tokens, longest),
            _cut(num_tokens, longest, num_chunks=1, first_start=latest),
        ):
            yield ProfilePoint(chunks=chunks)


def _mixes(limits: PipelineLimits) -> Iterator[ProfilePoint]:
    contexts = _contexts(limits)
    context = contexts[len(contexts) // 2]
    for num_decodes in _sizes(limits.max_decodes)[2::2]:
        for num_tokens in _sizes(limits.max_batch_tokens - num_decodes)[4::2]:
            chunks = _several(num_tokens, limits.max_model_len)
            yield ProfilePoint(decodes=_spread(num_decodes, context), chunks=chunks)


def _spread(num_decodes: int, longest: int) -> tuple[Span, ...]:
    """Decodes whose contexts are spread evenly up to the longest, as those in service differ.

    Kernels that pad to the longest, or share work out by sequences, are slower for these than for
    as many tokens in equal contexts.
    """
    contexts = (-(-longest * (index + 1) // num_decodes) for index in range(num_decodes))
    return tuple(Span(context - 1, 1) for context in contexts)


def _several(num_tokens: int, longest: int) -> tuple[Span, ...]:
    num_chunks = max(1, min(_NUM_CHUNKS, num_tokens // _SHORTEST_CHUNK))
    return _cut(num_tokens, longest, num_chunks=num_chunks)


def _cut(
    num_tokens: int, longest: int, *, num_chunks: int, first_start: int = 0
) -> tuple[Span, ...]:
    """Chunks of about one length: `num_chunks`, or more where one would exceed the longest.

    Later ones start later, as those of prompts of which more is computed already.
    """
    num_chunks = max(num_chunks, -(-num_tokens // longest))
    each, rest = divmod(num_tokens, num_chunks)
    chunks = []
    for index in range(num_chunks):
        length = each + (index < rest)
        room = longest - length - first_start
        chunks.append(Span(first_start + room * index // num_chunks, length))
    return tuple(chunks)


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
