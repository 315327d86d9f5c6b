"""Where each sequence stands, and the KV blocks it holds.

Admission takes blocks for a whole prompt at once, because two half-admitted prompts can each hold
what the other needs.
"""

from collections.abc import Iterable, Iterator
from operator import attrgetter

from gllm_ray.scheduling.block_allocator import BlockAllocator
from gllm_ray.scheduling.policies.base import TokenBudget
from gllm_ray.scheduling.prefix_cache import PrefixCache
from gllm_ray.scheduling.sequence import Sequence, SequenceState
from gllm_ray.scheduling.settings import SchedulerSettings
from gllm_ray.scheduling.step import Step
from gllm_ray.scheduling.waiting_queue import WaitingQueue


class SequencePool:
    """The sequences that are alive, in three queues by what they hold.

    A sequence with nothing left to schedule before its next token is in none of the three.

    A sequence may be ready before its latest token is known: that token is in flight, and stands
    for itself as `Sequence.token_ids` says.

    Attributes:
        waiting: They hold no block.
        live: All others that go on, by id, in the order of admission.
        prefilling: They hold blocks for a prompt that is not wholly scheduled, by id.
        ready: In decode and without a decode in flight, but perhaps with the micro-batch that
            samples what to decode; by id, the one that waits longest first.
        num_arrivals: Sequences added so far.
        num_prefilling_tokens: Unscheduled tokens of `prefilling`.
        num_remaining_tokens: Output tokens to come, of all sequences in decode.
        num_context_tokens: Tokens of all sequences in decode.
        num_preemptions: Preemptions so far.
    """

    def __init__(self, settings: SchedulerSettings, *, overtaking: float) -> None:
        self.allocator = BlockAllocator(settings.num_blocks, settings.block_size)
        self.prefix_cache = PrefixCache(self.allocator, is_enabled=settings.prefix_caching)
        self.waiting = WaitingQueue(fair_share=settings.fair_share, overtaking=overtaking)
        self.live: dict[int, Sequence] = {}
        self.prefilling: dict[int, Sequence] = {}
        self.ready: dict[int, Sequence] = {}
        self.num_arrivals = 0
        self.num_prefilling_tokens = 0
        self.num_remaining_tokens = 0
        self.num_context_tokens = 0
        self.num_preemptions = 0
        self._sequences: dict[int, Sequence] = {}  # in order of arrival
        self._copies: list[tuple[int, int]] = []
        self._ended: list[int] = []
        self._refused: tuple[int, int, int, int] | None = None  # when the head found no room

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences.values())

    def __getitem__(self, seq_id: int) -> Sequence:
        return self._sequences[seq_id]

    @property
    def num_waiting_tokens(self) -> int:
        """Prompt tokens not yet scheduled, whatever the prefix cache knows of them."""
        return self.waiting.num_tokens + self.num_prefilling_tokens

    @property
    def has_work(self) -> bool:
        """Whether a sequence waits for its next micro-batch."""
        return bool(self.ready or self.prefilling or self.waiting)

    def add(self, sequence: Sequence, deadline_s: float | None) -> None:
        """Let a new sequence wait, until a time if one is given."""
        self._sequences[sequence.seq_id] = sequence
        self.num_arrivals += 1
        self.waiting.add(sequence, deadline_s)

    def under_way(self) -> Sequence | None:
        """The sequence that goes on first of those that hold blocks for a prompt."""
        return min(self.prefilling.values(), key=attrgetter("rank"), default=None)

    def schedule_prefills(self, step: Step, max_tokens: int, reserved_blocks: int) -> None:
        """Put the next chunks of prompts in flight, by rank; of equals, those under way first."""
        while max_tokens > 0:
            sequence = self._next_prefill(reserved_blocks)
            if sequence is None:
                return
            num_tokens = min(sequence.num_uncomputed_tokens, max_tokens)
            item = sequence.schedule_chunk(num_tokens)
            self.prefix_cache.publish(sequence, item.start)
            self.num_prefilling_tokens -= num_tokens
            if sequence.num_uncomputed_tokens == 0:
                self._begin_decode(sequence)
            step.add_chunk(sequence, item)
            max_tokens -= num_tokens

    def schedule_decodes(self, step: Step, budget: TokenBudget, *, may_wait: bool) -> None:
        """Put the next token of ready sequences in flight, until the budget is spent.

        A block that is missing is taken from the sequence of the highest rank. That may be the one
        that misses it, which then is preempted, or goes on waiting if it may.
        """
        ready, block_size = self.ready, self.allocator.block_size
        items, sampling = step.items, step.sampling
        max_decodes, weight = budget.decodes, budget.decode_weight
        load_left = float("inf") if budget.decode_load is None else budget.decode_load
        num_context_tokens = 0
        for seq_id, sequence in list(ready.items()):
            if len(items) == max_decodes or load_left <= 0:
                break
            # Making room for one sequence may have preempted one that stood behind it.
            if seq_id not in ready:
                continue
            num_tokens = len(sequence.token_ids)
            has_room = num_tokens <= len(sequence.block_table) * block_size
            if not (has_room or self._grow(sequence, may_wait=may_wait)):
                continue
            item = sequence.schedule_decode()
            if num_tokens % block_size == 0 and item.token_ids[0] >= 0:
                self.prefix_cache.publish(sequence, item.start)
            del ready[seq_id]
            items.append(item)
            sampling.append(sequence)
            num_context_tokens += num_tokens
            load_left -= weight + num_tokens
        step.num_decodes, step.num_context_tokens = len(items), num_context_tokens

    def take_copies(self) -> tuple[tuple[int, int], ...]:
        """The blocks that the micro-batch now complete copies, source and target.

        The sources were held so far, lest the same micro-batch write to them anew.
        """
        copies = tuple(self._copies)
        self._copies.clear()
        self.allocator.release([source for source, _ in copies])
        return copies

    def take_ended(self) -> tuple[int, ...]:
        """The sequences whose draws depend on their output, forgotten since the last call."""
        ended = tuple(self._ended)
        self._ended.clear()
        return ended

    def anticipate(self, sampling: Iterable[Sequence], now_s: float) -> None:
        """Let sequences go on for which the oldest micro-batch in flight samples these tokens."""
        num_tokens = 0
        for index, sequence in enumerate(sampling):
            if sequence.is_aborted or sequence.has_ended:
                self.retire(sequence)
                continue
            num_tokens += 1
            sequence.token_ids.append(~index)
            if len(sequence.token_ids) == sequence.max_num_tokens:
                self.retire(sequence)
            else:
                sequence.token_s = now_s
                self.ready[sequence.seq_id] = sequence
        self.count_output(num_tokens)

    def confirm(self, sequence: Sequence, token_id: int) -> None:
        """The token that was anticipated is known."""
        token_ids = sequence.token_ids
        token_ids[-1] = token_id
        num_tokens = len(token_ids)
        if num_tokens % self.allocator.block_size == 0 and sequence.num_in_flight:
            self.prefix_cache.publish(sequence, num_tokens - 1)

    def count_output(self, num_tokens: int) -> None:
        """Note that sequences in decode got tokens, those among them included that then ended."""
        self.num_remaining_tokens -= num_tokens
        self.num_context_tokens += num_tokens

    def dequeue(self, sequence: Sequence) -> None:
        """Take a sequence out of whichever queue holds it, so that it is not scheduled."""
        if sequence.state is SequenceState.WAITING:
            self.waiting.remove(sequence)
        elif self.prefilling.pop(sequence.seq_id, None) is not None:
            self.num_prefilling_tokens -= sequence.num_uncomputed_tokens
        elif self.ready.pop(sequence.seq_id, None) is not None and sequence.num_in_flight:
            self.retire(sequence)

    def retire(self, sequence: Sequence) -> None:
        """Schedule a sequence no more, that keeps its blocks for what is in flight."""
        self._leave(sequence)
        sequence.state = SequenceState.ENDING

    def requeue(self, sequence: Sequence) -> None:
        """Take all blocks of a sequence; it will be prefilled again, output included."""
        self.dequeue(sequence)
        self._release(sequence)
        sequence.restart()
        self.waiting.add(sequence)

    def forget(self, sequence: Sequence) -> None:
        """Drop a sequence that no micro-batch holds, and that does not wait or prefill."""
        self._release(sequence)
        del self._sequences[sequence.seq_id]
        if sequence.sampling.needs_output:
            self._ended.append(sequence.seq_id)

    def _next_prefill(self, reserved_blocks: int) -> Sequence | None:
        """The prompt under way of the lowest rank, unless one is admitted that ranks lower."""
        under_way, head = self.under_way(), self.waiting.head()
        if head is None or (under_way is not None and under_way.rank < head.rank):
            return under_way
        return self._admit_head(reserved_blocks) or under_way

    def _admit_head(self, reserved_blocks: int) -> Sequence | None:
        """Take blocks for the whole prompt that is next; None if it has to wait."""
        sequence = self.waiting.head()
        if sequence is None:
            return None
        allocator = self.allocator
        if allocator.num_free_blocks == allocator.num_blocks:
            reserved_blocks = 0  # no decode is running that the reserve could save
        circumstances = (
            sequence.seq_id,
            allocator.num_free_blocks,
            allocator.num_published,
            reserved_blocks,
        )
        if circumstances == self._refused:
            return None  # without another look at each block of its prefix
        hit = self.prefix_cache.find(sequence)
        num_new_blocks = allocator.blocks_for(sequence.num_tokens) - len(hit.blocks)
        num_taken = num_new_blocks + allocator.num_cached(hit.blocks)
        if num_taken + reserved_blocks >= allocator.num_free_blocks:
            hit = hit._replace(last_block=None)  # it would have to be held, too, to be copied
        if num_taken + reserved_blocks > allocator.num_free_blocks:
            self._refused = circumstances
            return None
        self.waiting.pop()
        self.prefix_cache.reuse(sequence, hit)
        if sequence.epoch == 0:
            sequence.num_cached_tokens = sequence.num_computed_tokens
        sequence.block_table += allocator.allocate(num_new_blocks)
        if hit.last_block is not None:
            self._copies.append((hit.last_block, sequence.block_table[-1]))
        sequence.state = SequenceState.PREFILLING
        self.live[sequence.seq_id] = sequence
        self.prefilling[sequence.seq_id] = sequence
        self.num_prefilling_tokens += sequence.num_uncomputed_tokens
        return sequence

    def _begin_decode(self, sequence: Sequence) -> None:
        """All of a prompt is scheduled: its next token comes with the result."""
        del self.prefilling[sequence.seq_id]
        self.prefix_cache.publish_end(sequence)
        sequence.state = SequenceState.DECODING
        self.num_remaining_tokens += sequence.num_remaining_tokens
        self.num_context_tokens += sequence.num_tokens

    def _grow(self, sequence: Sequence, *, may_wait: bool) -> bool:
        """Give a ready sequence one more block; False if it cannot have it now.

        While its latest token is not known it preempts none, because it may have ended.
        """
        while not self.allocator.num_free_blocks:
            if sequence.num_in_flight:
                return False
            victim = self._last_preemptible()
            if victim is not sequence or not may_wait:
                self.requeue(victim)
                self.num_preemptions += 1
            if victim is sequence:
                return False
        sequence.block_table += self.allocator.allocate(1)
        return True

    def _last_preemptible(self) -> Sequence:
        """The sequence of the highest rank that holds blocks and is not in flight."""
        idle = [
            sequence
            for queue in (self.prefilling, self.ready)
            for sequence in queue.values()
            if not sequence.num_in_flight
        ]
        return max(idle, key=attrgetter("rank"))

    def _release(self, sequence: Sequence) -> None:
        self._leave(sequence)
        self.allocator.release(sequence.block_table)

    def _leave(self, sequence: Sequence) -> None:
        self.ready.pop(sequence.seq_id, None)
        self.live.pop(sequence.seq_id, None)
        if sequence.state is SequenceState.DECODING:
            self.num_remaining_tokens -= sequence.num_remaining_tokens
            self.num_context_tokens -= sequence.num_tokens
