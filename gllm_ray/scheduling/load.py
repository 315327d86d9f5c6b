"""What a decision rests on: the load of the whole pipeline, and that of one micro-batch."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class StepLoad(NamedTuple):
    """What one micro-batch makes each stage compute.

    Attributes:
        num_decodes: Decodes, one token each.
        num_context_tokens: KV tokens that the decodes read, their own included.
        num_prefill_tokens: Tokens of prefill chunks.
        num_attention_pairs: Query-key pairs of prefill chunks: for each, its tokens times the
            position after its last. The causal half is not left out, because kernels compute the
            full square of a chunk to within a few per cent.
    """

    num_decodes: int = 0
    num_context_tokens: int = 0
    num_prefill_tokens: int = 0
    num_attention_pairs: int = 0

    @property
    def num_tokens(self) -> int:
        """Rows of the packed batch."""
        return self.num_decodes + self.num_prefill_tokens


class CostModel(Protocol):
    """Predicts how long the slowest stage takes for a micro-batch."""

    @property
    def is_calibrated(self) -> bool:
        """Whether predictions are seconds; until then they are in units of one token's time."""

    @property
    def tile(self) -> int:
        """Rows that cost as much as the next multiple of this; 1 where cost has no steps."""

    def stage_time(self, load: StepLoad) -> float:
        """The time of the slowest stage; never falls when any part of the load grows."""

    def observe(self, load: StepLoad, time_s: float) -> None:
        """Learn from the measured time of the slowest stage."""


class SequenceLoad(Protocol):
    """What a policy may know of one sequence."""

    @property
    def num_tokens(self) -> int:
        """Prompt tokens and output so far."""

    @property
    def num_expected_tokens(self) -> int:
        """Output tokens still to come as predicted; at least 1, at most what `max_tokens` leaves.

        A missing prediction, and one that the output has outgrown, counts as `max_tokens`.
        """


@dataclass(slots=True, kw_only=True)
class LoadView:
    """The state of the whole pipeline at the moment a micro-batch is formed.

    Attributes:
        now_s: The driver's clock, from any origin; stands still if the driver has none.
        batch_id: Id the next micro-batch will have; counts up by one.
        num_stages: Depth of the pipeline.
        num_in_flight: Micro-batches in flight, but for the one that counts as committed.
        num_tokens_in_flight: Their rows.
        max_in_flight: How many there may be, counted alike.
        crowding: As `SchedulerSettings.crowding`.
        num_arrivals: Requests that came so far.
        num_waiting_tokens: Prompt tokens not yet scheduled, of waiting and prefilling sequences.
        num_waiting_token_steps: KV tokens that waiting sequences are expected to hold, summed over
            their decodes.
        num_prefilling: Sequences that hold blocks for a prompt that is not wholly scheduled.
        prefill_start: Position at which the next prefill chunk starts, prefix hits aside.
        num_decoding: Sequences in decode, ready or in flight, and those whose decode in flight is
            in vain.
        num_ready: Those of them that are not in flight.
        num_context_tokens: Tokens of the sequences in decode, ready or in flight.
        num_live: Sequences that hold blocks.
        num_prefills_in_flight: Prefill chunks in flight.
        num_remaining_tokens: Output tokens that the sequences in decode, and those whose last
            chunk is in flight, may still produce.
        oldest_token_s: When the ready sequence that waits longest got its latest token; None if
            none is ready.
        num_preemptions: Preemptions so far.
        num_blocks: KV blocks in all.
        num_free_blocks: Blocks that can be allocated, cached ones included.
        block_size: Tokens a block holds.
        kv_free_ratio: Share of the blocks that hold no computed token, 0 to 1. Blocks taken for
            prompt tokens not yet scheduled count as free.
        cost: Predicts stage times.
        max_decodes: Decodes a micro-batch may hold whatever the budget.
        head: The waiting sequence that is admitted next; None if none waits.
        waiting: The waiting sequences by rank; all but the head are admitted in that order as long
            as no priority is passed over and no long output goes first. May be iterated again.
        live: The sequences that hold blocks, in flight or not; may be iterated again.
    """

    now_s: float
    batch_id: int
    num_stages: int
    num_in_flight: int
    num_tokens_in_flight: int
    max_in_flight: int
    crowding: float
    num_arrivals: int
    num_waiting_tokens: int
    num_waiting_token_steps: int
    num_prefilling: int
    prefill_start: int
    num_decoding: int
    num_ready: int
    num_context_tokens: int
    num_live: int
    num_prefills_in_flight: int
    num_remaining_tokens: int
    oldest_token_s: float | None
    num_preemptions: int
    num_blocks: int
    num_free_blocks: int
    block_size: int
    kv_free_ratio: float
    max_decodes: int
    cost: CostModel
    head: SequenceLoad | None
    waiting: Iterable[SequenceLoad]
    live: Iterable[SequenceLoad]
