"""The global scheduler: which sequences ride in the next micro-batch, and what came of it.

Admission takes blocks for a whole prompt at once, because two half-admitted prompts can each hold
what the other needs. Nothing in flight is ever preempted, freed or aborted, so a stage never
writes to a block that has a new owner.
"""

from collections import deque

from gllm_ray.errors import InvalidRequestError, PipelineError
from gllm_ray.messages import (
    FinishReason,
    GenerationRequest,
    MicroBatch,
    MicroBatchResult,
    ScheduledSequence,
    TokenEvent,
)
from gllm_ray.scheduling.block_allocator import BlockAllocator
from gllm_ray.scheduling.policies.base import LoadView, Policy, TokenBudget
from gllm_ray.scheduling.prefix_cache import PrefixCache
from gllm_ray.scheduling.sequence import Sequence, SequenceState

# What runs when a policy's budget would leave an idle pipeline idle although work waits.
_STALL_BUDGET = TokenBudget(prefill_tokens=256, decodes=1)


class Scheduler:
    """Holds every sequence of one pipeline and decides what each micro-batch computes.

    A driver calls `add` and `abort` at any time, `schedule` until it returns None, and `commit`
    for each result in submit order. The same calls give the same decisions on any machine.

    Args:
        policy: Sets the budget of each micro-batch.
        num_stages: Depth of the pipeline.
        num_blocks: KV blocks that every stage has.
        block_size: Tokens a block holds.
        max_model_len: Prompt and output tokens a sequence may have.
        max_in_flight: Micro-batches submitted and not yet committed, at most.
        max_decodes: Decodes in one micro-batch, at most.
        prefix_caching: Whether sequences share the blocks of a common prefix.
    """

    def __init__(  # noqa: PLR0913
        self,
        policy: Policy,
        *,
        num_stages: int,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        max_in_flight: int,
        max_decodes: int,
        prefix_caching: bool = True,
    ) -> None:
        self.num_preemptions = 0
        self._policy = policy
        self._num_stages = num_stages
        self._max_model_len = max_model_len
        self._max_in_flight = max_in_flight
        self._max_decodes = max_decodes
        self._allocator = BlockAllocator(num_blocks, block_size)
        self._prefix_cache = PrefixCache(self._allocator, is_enabled=prefix_caching)
        self._sequences: dict[int, Sequence] = {}  # all that are alive, in order of arrival
        self._seq_ids: dict[str, int] = {}
        # A sequence with nothing left to schedule before its next token is in none of the three.
        self._waiting: deque[Sequence] = deque()  # in order of arrival
        self._prefilling: dict[int, Sequence] = {}
        self._decoding: dict[int, Sequence] = {}
        self._num_waiting_tokens = 0  # tokens in _waiting, whatever the prefix cache knows of them
        self._num_prefilling_tokens = 0  # uncomputed tokens in _prefilling
        self._num_remaining_tokens = 0  # output tokens to come, of sequences in decode
        self._in_flight: deque[tuple[MicroBatch, int]] = deque()  # each with its decodes' number
        self._next_seq_id = 0
        self._next_batch_id = 0

    @property
    def num_requests(self) -> int:
        """Requests accepted and not ended."""
        return len(self._sequences)

    @property
    def is_idle(self) -> bool:
        """No request is alive."""
        return not self._sequences

    @property
    def num_in_flight(self) -> int:
        """Micro-batches submitted and not yet committed."""
        return len(self._in_flight)

    @property
    def kv_utilization(self) -> float:
        """Share of the KV blocks in use, 0 to 1; blocks that are only cached are not."""
        return 1 - self._allocator.num_free_blocks / self._allocator.num_blocks

    @property
    def num_prefix_queried_tokens(self) -> int:
        """Tokens of admitted prompts that were looked up in the prefix cache."""
        return self._prefix_cache.num_queried_tokens

    @property
    def num_prefix_hit_tokens(self) -> int:
        """Those of them that were found there."""
        return self._prefix_cache.num_hit_tokens

    def add(self, request: GenerationRequest) -> None:
        """Accept a request; from here on it ends with exactly one terminal event.

        Raises:
            InvalidRequestError: The request can never be served.
        """
        self._refuse_invalid(request)
        sequence = Sequence(self._next_seq_id, request)
        self._next_seq_id += 1
        self._sequences[sequence.seq_id] = sequence
        self._seq_ids[request.request_id] = sequence.seq_id
        self._waiting.append(sequence)
        self._num_waiting_tokens += sequence.num_uncomputed_tokens

    def abort(self, request_id: str) -> list[TokenEvent]:
        """End a request early; one that is in flight ends at its commit.

        Returns:
            The terminal event, if the request ends now. Unknown ids are ignored.
        """
        seq_id = self._seq_ids.get(request_id)
        if seq_id is None:
            return []
        sequence = self._sequences[seq_id]
        self._dequeue(sequence)
        if sequence.num_in_flight:
            sequence.is_aborted = True
            return []
        return [self._finish(sequence, FinishReason.ABORT)]

    def schedule(self) -> MicroBatch | None:
        """Form the next micro-batch, or return None if there is nothing to submit now.

        Decodes go first, then prompts under way, then waiting ones, each in order of arrival.
        """
        if len(self._in_flight) >= self._max_in_flight:
            return None
        decodes, prefills = self._select(self._policy.budget(self._view()))
        if not (decodes or prefills or self._in_flight):
            decodes, prefills = self._select(_STALL_BUDGET)
        if not (decodes or prefills):
            return None
        batch = MicroBatch(batch_id=self._next_batch_id, sequences=(*decodes, *prefills))
        self._next_batch_id += 1
        self._in_flight.append((batch, len(decodes)))
        return batch

    def commit(self, result: MicroBatchResult) -> list[TokenEvent]:
        """Apply the result of the oldest micro-batch in flight.

        Returns:
            One event for each sequence that got a token or ended.

        Raises:
            PipelineError: The result is not the one that is due.
        """
        batch = self._in_flight[0][0] if self._in_flight else None
        if batch is None or batch.batch_id != result.batch_id:
            due = "none" if batch is None else batch.batch_id
            raise PipelineError(f"result of micro-batch {result.batch_id} came, {due} is due")
        sampled = [item for item in batch.sequences if item.sampling is not None]
        if len(sampled) != len(result.token_ids):
            raise PipelineError(
                f"micro-batch {batch.batch_id} samples {len(sampled)} tokens, "
                f"its result has {len(result.token_ids)}"
            )
        self._in_flight.popleft()
        tokens = dict(zip((item.seq_id for item in sampled), result.token_ids, strict=True))
        events = [self._advance(item, tokens.get(item.seq_id)) for item in batch.sequences]
        return [event for event in events if event is not None]

    def fail_all(self, message: str) -> list[TokenEvent]:
        """End every request with an error, because the pipeline is gone.

        Returns:
            One terminal event for each request that was alive.
        """
        self._in_flight.clear()
        events = []
        for sequence in list(self._sequences.values()):
            self._dequeue(sequence)
            events.append(self._finish(sequence, FinishReason.ERROR, error=message))
        self._allocator.forget_contents()
        return events

    def _refuse_invalid(self, request: GenerationRequest) -> None:
        num_prompt_tokens = len(request.prompt_token_ids)
        num_tokens = num_prompt_tokens + request.max_tokens
        if request.request_id in self._seq_ids:
            raise InvalidRequestError(
                f"request id {request.request_id!r} is in use; choose another"
            )
        if num_prompt_tokens == 0:
            raise InvalidRequestError("the prompt is empty; give at least one token")
        if request.max_tokens < 1:
            raise InvalidRequestError(f"max_tokens is {request.max_tokens}; it must be at least 1")
        # The last output token is returned, never computed, so it needs no place in the KV cache.
        limit = min(
            self._max_model_len, self._allocator.num_blocks * self._allocator.block_size + 1
        )
        if num_tokens > limit:
            raise InvalidRequestError(
                f"prompt ({num_prompt_tokens} tokens) and max_tokens ({request.max_tokens}) come "
                f"to {num_tokens} tokens; the limit is {limit}",
                code="context_length_exceeded",
            )

    def _view(self) -> LoadView:
        allocator = self._allocator
        num_in_flight = sum(len(batch.sequences) for batch, _ in self._in_flight)
        num_decodes_in_flight = sum(num_decodes for _, num_decodes in self._in_flight)
        num_unwritten_blocks = self._num_prefilling_tokens // allocator.block_size
        return LoadView(
            batch_id=self._next_batch_id,
            num_stages=self._num_stages,
            num_waiting_tokens=self._num_waiting_tokens + self._num_prefilling_tokens,
            num_decoding=len(self._decoding) + num_decodes_in_flight,
            num_ready=len(self._decoding),
            num_prefills_in_flight=num_in_flight - num_decodes_in_flight,
            num_remaining_tokens=self._num_remaining_tokens,
            num_preemptions=self.num_preemptions,
            num_blocks=allocator.num_blocks,
            block_size=allocator.block_size,
            kv_free_ratio=(allocator.num_free_blocks + num_unwritten_blocks) / allocator.num_blocks,
        )

    def _select(
        self, budget: TokenBudget
    ) -> tuple[list[ScheduledSequence], list[ScheduledSequence]]:
        """Put as much in flight as the budget lets: decodes, and prefill chunks."""
        decodes = self._select_decodes(min(budget.decodes, self._max_decodes))
        taken = len(decodes) if budget.is_shared else 0
        prefill_tokens = max(0, budget.prefill_tokens - taken)
        return decodes, self._select_prefills(prefill_tokens, budget.reserved_blocks)

    def _select_decodes(self, max_decodes: int) -> list[ScheduledSequence]:
        scheduled: list[ScheduledSequence] = []
        for sequence in list(self._decoding.values()):
            if len(scheduled) == max_decodes:
                break
            # Making room for one sequence may have preempted one that stood behind it.
            if sequence.seq_id in self._decoding and self._grow(sequence):
                del self._decoding[sequence.seq_id]
                scheduled.append(self._put_in_flight(sequence, 1))
        return scheduled

    def _select_prefills(self, max_tokens: int, reserved_blocks: int) -> list[ScheduledSequence]:
        scheduled: list[ScheduledSequence] = []
        for sequence in list(self._prefilling.values()):
            if max_tokens == 0:
                break
            scheduled.append(self._schedule_chunk(sequence, max_tokens))
            max_tokens -= scheduled[-1].num_scheduled_tokens
        while max_tokens > 0 and self._waiting and self._admit(self._waiting[0], reserved_blocks):
            scheduled.append(self._schedule_chunk(self._waiting.popleft(), max_tokens))
            max_tokens -= scheduled[-1].num_scheduled_tokens
        return scheduled

    def _schedule_chunk(self, sequence: Sequence, max_tokens: int) -> ScheduledSequence:
        num_tokens = min(sequence.num_uncomputed_tokens, max_tokens)
        self._num_prefilling_tokens -= num_tokens
        chunk = self._put_in_flight(sequence, num_tokens)
        if sequence.num_uncomputed_tokens == 0:
            del self._prefilling[sequence.seq_id]
            sequence.state = SequenceState.DECODING
            self._num_remaining_tokens += sequence.num_remaining_tokens
        return chunk

    def _put_in_flight(self, sequence: Sequence, num_tokens: int) -> ScheduledSequence:
        item = sequence.schedule(num_tokens)
        self._prefix_cache.publish(sequence, item)
        return item

    def _admit(self, sequence: Sequence, reserved_blocks: int) -> bool:
        """Take blocks for a waiting sequence's whole prompt; False if they are not there."""
        allocator = self._allocator
        if allocator.num_free_blocks == allocator.num_blocks:
            reserved_blocks = 0  # no decode is running that the reserve could save
        hit = self._prefix_cache.find(sequence)
        num_new_blocks = allocator.blocks_for(len(sequence.token_ids)) - len(hit)
        num_taken = num_new_blocks + allocator.num_cached(hit)
        if num_taken + reserved_blocks > allocator.num_free_blocks:
            return False
        self._num_waiting_tokens -= sequence.num_uncomputed_tokens
        self._prefix_cache.reuse(sequence, hit)
        sequence.block_table += allocator.allocate(num_new_blocks)
        sequence.state = SequenceState.PREFILLING
        self._prefilling[sequence.seq_id] = sequence
        self._num_prefilling_tokens += sequence.num_uncomputed_tokens
        return True

    def _grow(self, sequence: Sequence) -> bool:
        """Make sure a decode's token has a block; False if the sequence cannot run now."""
        allocator = self._allocator
        while allocator.blocks_for(len(sequence.token_ids)) > len(sequence.block_table):
            if allocator.num_free_blocks:
                sequence.block_table += allocator.allocate(1)
                continue
            victim = self._youngest_preemptible()
            if victim.seq_id <= sequence.seq_id and self._in_flight:
                return False  # the older ones go on; blocks may come back with a commit
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _youngest_preemptible(self) -> Sequence:
        idle = [s for s in self._prefilling.values() if not s.num_in_flight]
        return max([*idle, *self._decoding.values()], key=lambda s: s.seq_id)

    def _preempt(self, sequence: Sequence) -> None:
        """Take all blocks of a sequence; it will be prefilled again, output included."""
        self._dequeue(sequence)
        self._release(sequence)
        sequence.restart()
        position = sum(1 for s in self._waiting if s.seq_id < sequence.seq_id)
        self._waiting.insert(position, sequence)
        self._num_waiting_tokens += sequence.num_uncomputed_tokens
        self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        """Take the blocks of a sequence that no queue and no micro-batch holds."""
        self._allocator.release(sequence.block_table)
        if sequence.state is SequenceState.DECODING:
            self._num_remaining_tokens -= sequence.num_remaining_tokens

    def _dequeue(self, sequence: Sequence) -> None:
        """Take a sequence out of whichever queue holds it, so that it is not scheduled."""
        if sequence.state is SequenceState.WAITING:
            self._waiting.remove(sequence)
            self._num_waiting_tokens -= sequence.num_uncomputed_tokens
        elif self._prefilling.pop(sequence.seq_id, None) is not None:
            self._num_prefilling_tokens -= sequence.num_uncomputed_tokens
        else:
            self._decoding.pop(sequence.seq_id, None)

    def _advance(self, item: ScheduledSequence, token_id: int | None) -> TokenEvent | None:
        """Apply one sequence's share of a result."""
        sequence = self._sequences[item.seq_id]
        assert item.epoch == sequence.epoch, "a sequence in flight was preempted"
        sequence.num_in_flight -= 1
        if sequence.is_aborted:
            done = sequence.num_in_flight == 0
            return self._finish(sequence, FinishReason.ABORT) if done else None
        if token_id is None:
            return None
        sequence.token_ids.append(token_id)
        self._num_remaining_tokens -= 1
        request = sequence.request
        if token_id in request.stop_token_ids:
            return self._finish(sequence, FinishReason.STOP, token_id=token_id)
        if sequence.num_output_tokens == request.max_tokens:
            return self._finish(sequence, FinishReason.LENGTH, token_id=token_id)
        self._decoding[sequence.seq_id] = sequence
        return TokenEvent(request_id=request.request_id, token_id=token_id)

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        *,
        token_id: int | None = None,
        error: str | None = None,
    ) -> TokenEvent:
        """Forget a sequence that no queue and no micro-batch holds."""
        self._release(sequence)
        del self._sequences[sequence.seq_id]
        request_id = sequence.request.request_id
        del self._seq_ids[request_id]
        return TokenEvent(
            request_id=request_id, token_id=token_id, finish_reason=reason, error=error
        )
