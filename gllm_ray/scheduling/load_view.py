"""What a policy sees of a pipeline."""

from gllm_ray.scheduling.flights import Flights
from gllm_ray.scheduling.load import CostModel, LoadView
from gllm_ray.scheduling.pool import SequencePool
from gllm_ray.scheduling.settings import SchedulerSettings


def take_view(
    pool: SequencePool,
    flights: Flights,
    settings: SchedulerSettings,
    cost: CostModel,
    now_s: float,
) -> LoadView:
    """The state of the pipeline at the moment a micro-batch is formed."""
    allocator, steps = pool.allocator, flights.pending
    num_decodes = sum([step.num_decodes for step in steps])
    num_items = sum([len(step.items) for step in steps])
    num_ending_tokens = sum([step.num_ending_tokens for step in steps])
    num_unwritten_blocks = pool.num_prefilling_tokens // allocator.block_size
    next_prefill = pool.under_way()
    oldest_ready = next(iter(pool.ready.values()), None)
    num_free_blocks = allocator.num_free_blocks
    return LoadView(
        now_s=now_s,
        batch_id=flights.next_batch_id,
        num_stages=settings.num_stages,
        num_in_flight=len(steps),
        num_tokens_in_flight=num_decodes + sum([step.num_prefill_tokens for step in steps]),
        max_in_flight=flights.max_pending,
        crowding=settings.crowding,
        num_arrivals=pool.num_arrivals,
        num_waiting_tokens=pool.num_waiting_tokens,
        num_waiting_token_steps=pool.waiting.num_token_steps,
        num_prefilling=len(pool.prefilling),
        prefill_start=next_prefill.num_computed_tokens if next_prefill else 0,
        num_decoding=len(pool.ready) + num_decodes,
        num_ready=len(pool.ready),
        num_context_tokens=pool.num_context_tokens - num_ending_tokens,
        num_live=len(pool.live),
        num_prefills_in_flight=num_items - num_decodes,
        num_remaining_tokens=pool.num_remaining_tokens,
        oldest_token_s=oldest_ready.token_s if oldest_ready else None,
        num_preemptions=pool.num_preemptions,
        num_blocks=allocator.num_blocks,
        num_free_blocks=num_free_blocks,
        block_size=allocator.block_size,
        kv_free_ratio=(num_free_blocks + num_unwritten_blocks) / allocator.num_blocks,
        max_decodes=settings.max_decodes,
        cost=cost,
        head=pool.waiting.head(),
        waiting=pool.waiting,
        live=pool.live.values(),
    )
