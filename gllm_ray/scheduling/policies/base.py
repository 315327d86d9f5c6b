"""What a policy sees and what it decides."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadView:
    """The state of the whole pipeline at the moment a micro-batch is formed.

    Attributes:
        batch_id: Id the next micro-batch will have; counts up by one.
        num_stages: Depth of the pipeline.
        num_waiting_tokens: Prompt tokens not yet scheduled, of waiting and prefilling sequences.
        num_decoding: Sequences in decode, ready or in flight.
        num_ready: Those of them that are not in flight.
        num_prefills_in_flight: Prefill chunks in flight.
        num_remaining_tokens: Output tokens that the sequences in decode, and those whose last
            chunk is in flight, may still produce.
        num_preemptions: Preemptions so far.
        num_blocks: KV blocks in all.
        block_size: Tokens a block holds.
        kv_free_ratio: Share of the blocks that hold no computed token, 0 to 1. Blocks taken for
            prompt tokens not yet scheduled count as free.
    """

    batch_id: int
    num_stages: int
    num_waiting_tokens: int
    num_decoding: int
    num_ready: int
    num_prefills_in_flight: int
    num_remaining_tokens: int
    num_preemptions: int
    num_blocks: int
    block_size: int
    kv_free_ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBudget:
    """How much the next micro-batch may hold.

    Attributes:
        prefill_tokens: At most this many prompt tokens.
        decodes: At most this many decodes, one token each.
        reserved_blocks: Blocks that admitting a waiting sequence must leave free.
        is_shared: Each decode in the micro-batch takes one from `prefill_tokens`.
    """

    prefill_tokens: int
    decodes: int
    reserved_blocks: int = 0
    is_shared: bool = False

    def __post_init__(self) -> None:
        assert self.prefill_tokens >= 0, "negative prefill budget"
        assert self.decodes >= 0, "negative decode budget"


class Policy(Protocol):
    """Chooses the size of the next micro-batch; a pure function of the views so far."""

    def budget(self, view: LoadView) -> TokenBudget:
        """Decide what the next micro-batch may hold; called once for each `schedule`."""
