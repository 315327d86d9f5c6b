"""The order in which waiting sequences get their blocks: priority, fairness, arrival."""

from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from typing import Any, Generic, TypeVar

from gllm_ray.scheduling.sequence import Rank, Sequence

# One admission in this many goes to the sequence that came first, whatever its rank.
_AGING_INTERVAL = 8
_AGED_PRIORITY = float("-inf")
_MIN_COMPACTED = 64

Key = TypeVar("Key", bound=tuple[Any, ...])


class WaitingQueue:
    """Sequences that hold no block; the one of the lowest rank is admitted first.

    A rank is given when a sequence first waits, and kept when it is preempted: `priority`, then
    the tenant's virtual token counter (0 without `fair_share`), then arrival. A tenant's counter
    counts its prompt tokens; a tenant that comes anew starts level with those being served, so it
    can neither save up nor owe for long.

    No sequence starves: one admission in eight takes the oldest, which then ranks before all
    others, so that it is not preempted either.

    Source: Sheng et al., "Fairness in Serving Large Language Models", OSDI '24, Algorithm 2.
        Deviations: prompt tokens alone are charged, and when a request comes, not when it is
        admitted, which gives the same order because they are known.

    Args:
        fair_share: Whether tenants take turns; else only priority and arrival count.
    """

    def __init__(self, *, fair_share: bool = False) -> None:
        self.num_tokens = 0  # uncomputed tokens of all members
        self._fair_share = fair_share
        self._members: dict[int, Sequence] = {}
        self._ranks = _LazyHeap[Rank](self._members)
        self._arrivals = _LazyHeap[tuple[int]](self._members)
        self._deadlines = _LazyHeap[tuple[float, int]](self._members)
        self._counters: dict[str, int] = {}
        self._max_counters = _MIN_COMPACTED
        self._served_counter = 0  # of the latest sequence that was admitted
        self._num_pops = 0

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Sequence]:
        """By rank; costs as much as is taken from it."""
        for rank in self._ranks:
            sequence = self._members[rank[2]]
            if sequence.rank == rank:
                yield sequence

    @property
    def next_deadline_s(self) -> float | None:
        """When `take_expired` may next have something to take, if ever."""
        first = self._deadlines.first()
        return None if first is None else first[0]

    def add(self, sequence: Sequence, deadline_s: float | None = None) -> None:
        """Let a sequence wait; one that was preempted returns to its place.

        Args:
            sequence: It holds no block.
            deadline_s: When to give up on it, unless it has been admitted by then.
        """
        self._members[sequence.seq_id] = sequence
        self.num_tokens += sequence.num_uncomputed_tokens
        if sequence.rank is None:
            counter = self._charge(sequence) if self._fair_share else 0
            sequence.rank = (sequence.request.priority, counter, sequence.seq_id)
        self._ranks.push(sequence.rank)
        self._arrivals.push((sequence.seq_id,))
        if deadline_s is not None:
            self._deadlines.push((deadline_s, sequence.seq_id))

    def head(self) -> Sequence | None:
        """The sequence to admit next."""
        first = self._arrivals.first() if self._is_turn_of_oldest else self._ranks.first()
        return None if first is None else self._members[first[-1]]

    def pop(self) -> Sequence:
        """Take the head out: it is admitted."""
        sequence, first = self.head(), self._ranks.first()
        assert sequence is not None
        assert sequence.rank is not None
        self._served_counter = max(self._served_counter, sequence.rank[1])
        if sequence.rank != first:
            sequence.rank = (_AGED_PRIORITY, 0, sequence.seq_id)
        self._num_pops += 1
        self._forget(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out that ends without being admitted."""
        self._forget(sequence)
        tenant = sequence.request.tenant
        if not sequence.epoch and tenant in self._counters:
            self._counters[tenant] -= sequence.num_tokens

    def take_expired(self, now_s: float) -> Iterator[Sequence]:
        """Take out those that were never admitted, and whose deadline has passed."""
        while (first := self._deadlines.first()) is not None and first[0] <= now_s:
            self._deadlines.pop()
            sequence = self._members[first[1]]
            if not sequence.epoch:
                self.remove(sequence)
                yield sequence

    @property
    def _is_turn_of_oldest(self) -> bool:
        return self._num_pops % _AGING_INTERVAL == _AGING_INTERVAL - 1

    def _forget(self, sequence: Sequence) -> None:
        del self._members[sequence.seq_id]
        self.num_tokens -= sequence.num_uncomputed_tokens

    def _charge(self, sequence: Sequence) -> int:
        """Add a prompt to its tenant's counter; returns what the counter was."""
        tenant = sequence.request.tenant
        counter = max(self._counters.get(tenant, 0), self._served_counter)
        if len(self._counters) >= self._max_counters:
            # A counter that others have passed says as much as none.
            served = self._served_counter
            self._counters = {t: c for t, c in self._counters.items() if c > served}
            self._max_counters = max(_MIN_COMPACTED, 2 * len(self._counters))
        self._counters[tenant] = counter + sequence.num_tokens
        return counter


class _LazyHeap(Generic[Key]):
    """Keys of members, smallest first; a key ends with its member's id.

    The keys of those who left go when they come first, or when they are most of the heap.
    """

    def __init__(self, members: dict[int, Sequence]) -> None:
        self._members = members
        self._keys: list[Key] = []

    def __iter__(self) -> Iterator[Key]:
        keys = self._keys.copy()
        while keys:
            key = heappop(keys)
            if key[-1] in self._members:
                yield key

    def push(self, key: Key) -> None:
        heappush(self._keys, key)
        if len(self._keys) > _MIN_COMPACTED + 2 * len(self._members):
            self._keys = list({key for key in self._keys if key[-1] in self._members})
            heapify(self._keys)

    def first(self) -> Key | None:
        while self._keys and self._keys[0][-1] not in self._members:
            heappop(self._keys)
        return self._keys[0] if self._keys else None

    def pop(self) -> None:
        heappop(self._keys)
