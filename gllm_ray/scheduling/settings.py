"""What a scheduler is told about its pipeline, and what it may let wait."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueLimits:
    """What may wait; None: no limit.

    Attributes:
        max_requests: Requests that wait.
        max_tokens: Prompt tokens that wait; a request alone may have more.
        timeout_s: Seconds a request that names no other limit may wait for its first micro-batch.
    """

    max_requests: int | None = None
    max_tokens: int | None = None
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSettings:
    """The pipeline that a scheduler fills, and what it may do for that.

    Attributes:
        num_stages: Depth of the pipeline.
        num_blocks: KV blocks that every stage has.
        block_size: Tokens a block holds.
        max_model_len: Prompt and output tokens a sequence may have.
        max_decodes: Decodes in one micro-batch, at most.
        max_in_flight: Micro-batches in flight at most, the ring's additional one aside; None: as
            many as stages, and those that the policy wants ahead.
        crowding: How many times longer a stage computes while all others do, too; 1 where each has
            a processor to itself.
        ring: Whether one more micro-batch may be in flight, whose decodes continue those of the
            oldest one before its tokens are known here.
        prefix_caching: Whether sequences share the blocks of a common prefix.
        fair_share: Whether tenants take turns at prefill.
        queue: How much may wait, and for how long.
    """

    num_stages: int
    num_blocks: int
    block_size: int
    max_model_len: int
    max_decodes: int
    max_in_flight: int | None = None
    crowding: float = 1.0
    ring: bool = False
    prefix_caching: bool = True
    fair_share: bool = False
    queue: QueueLimits = field(default_factory=QueueLimits)
