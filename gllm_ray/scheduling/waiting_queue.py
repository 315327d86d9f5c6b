"""The order in which waiting sequences get their blocks: priority, fairness, arrival."""

from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from heapq import heapify, heappop, heappush, nlargest
from itertools import accumulate
from math import inf
from operator import attrgetter, itemgetter
from typing import Any, Generic, TypeVar

from gllm_ray.scheduling.long_outputs import LongOutputs
from gllm_ray.scheduling.sequence import Rank, Sequence

# One admission in this many is made without regard to priorities.
_AGING_INTERVAL = 8
_AGED_PRIORITY = float("-inf")
_MIN_COMPACTED = 64
_MAX_COUNTERS = 8192

Key = TypeVar("Key", bound=tuple[Any, ...])


class WaitingQueue:
    """Sequences that hold no block; the one of the lowest rank is admitted first.

    A rank is given when a sequence first waits, and kept when it is preempted: `priority`, then
    when it is due, then arrival. It is due `overtaking` times its prompt's tokens after those that
    came before it: all of them, or with `fair_share` its tenant's virtual token counter. So short
    prompts pass long ones, but no more tokens pass a prompt than that.

    The counter counts the tenant's prompt tokens, from at least the virtual time, so it can neither
    save up nor owe for long. Virtual time is what a tenant with a backlog has been served.

    `put_first` lets long outputs of the lowest priority go first, unless tenants take turns.

    One admission in eight is made without regard to priorities and lengths, so that nobody starves.
    Whoever is not admitted by its rank ranks before all others then, lest it be preempted.

    Source: Sheng et al., "Fairness in Serving Large Language Models", OSDI '24, Algorithm 2.
        Deviations: prompt tokens alone are charged, and when a request comes, which gives the
        order of charging at admission because they are known; who leaves without being admitted
        is taken off what its tenant sent later. Virtual time goes on with the service given, as in
        weighted fair queueing, lest ever new tenants hold it.

    Args:
        fair_share: Whether tenants take turns.
        overtaking: Tokens that may come later than a prompt and yet be admitted before it, for each
            of its own; 0: none.

    Attributes:
        num_tokens: Uncomputed tokens of all members.
        num_token_steps: KV tokens that they are expected to hold, summed over their decodes.
    """

    def __init__(self, *, fair_share: bool = False, overtaking: float = 0.0) -> None:
        self.num_tokens = 0
        self.num_token_steps = 0
        self._fair_share = fair_share
        self._overtaking = overtaking
        self._members: dict[int, Sequence] = {}
        self._ranks = _LazyHeap[Rank](self._members, _is_rank)
        self._ages = _LazyHeap[tuple[float, int]](self._members, _is_age)
        self._deadlines = _LazyHeap[tuple[float, int]](self._members, lambda key, sequence: True)
        self._counters: dict[str, float] = {}
        # With `fair_share`: virtual times of those never admitted, by tenant and id.
        self._arrivals: defaultdict[str, dict[int, float]] = defaultdict(dict)
        self._refunds: dict[str, list[tuple[int, int]]] = {}  # id and tokens of who left
        self._num_waiting: Counter[str] = Counter()  # members of each tenant that waits
        self._virtual_time = 0.0  # tokens
        self._num_tokens_before = 0  # of all prompts that ever came
        self._num_pops = 0
        self._long_outputs = LongOutputs(self._members)
        self._long_output = inf
        self._held_back: AbstractSet[int] = frozenset()
        self._admitted: AbstractSet[int] | None = None  # None: all that are not held back

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Sequence]:
        """By rank; costs little more than what is taken from it."""
        self._apply_refunds()
        for rank in self._ranks:
            yield self._members[rank[2]]

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
        self._num_waiting[sequence.request.tenant] += 1
        self.num_tokens += sequence.num_uncomputed_tokens
        self.num_token_steps += _token_steps(sequence)
        if not sequence.epoch:
            self._long_outputs.note_arrival()
            sequence.rank = (sequence.request.priority, self._due(sequence), sequence.seq_id)
        self._ranks.push(sequence.rank)
        self._ages.push(sequence.rank[1:])
        if deadline_s is not None:
            self._deadlines.push((deadline_s, sequence.seq_id))

    def hold_back(self, seq_ids: AbstractSet[int]) -> None:
        """Hold these back, whether they are here or come later, and nobody else."""
        self._held_back, self._admitted = seq_ids, None

    def admit_only(self, seq_ids: AbstractSet[int]) -> None:
        """Hold all others back, whether they are here or come later."""
        self._held_back, self._admitted = frozenset(), seq_ids

    def put_first(self, long_output: float) -> None:
        """Let outputs of at least so many expected tokens go first, the longest before others."""
        self._long_output = long_output

    def head(self) -> Sequence | None:
        """The sequence to admit next."""
        self._apply_refunds()
        if self._admitted is not None:
            admitted = (self._members[i] for i in self._admitted if i in self._members)
            return min(admitted, key=attrgetter("rank"), default=None)
        if self._held_back:
            return next((s for s in self if s.seq_id not in self._held_back), None)
        is_aged = self._num_pops % _AGING_INTERVAL == _AGING_INTERVAL - 1
        first = self._ages.first() if is_aged else self._ranks.first()
        if first is None:
            return None
        return (None if is_aged else self._first_long()) or self._members[first[-1]]

    def pop(self) -> Sequence:
        """Take the head out: it is admitted."""
        sequence, first = self.head(), self._ranks.first()
        assert sequence is not None
        _, due, seq_id = sequence.rank
        served = sequence.num_tokens / len(self._num_waiting)
        counter = due - self._overtaking * sequence.num_prompt_tokens
        self._virtual_time = max(self._virtual_time + served, counter)
        if sequence.rank != first and self._admitted is None and not self._held_back:
            sequence.rank = (_AGED_PRIORITY, due, seq_id)
        self._num_pops += 1
        self._forget(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out that ends without being admitted."""
        self._forget(sequence)
        tenant = sequence.request.tenant
        if not sequence.epoch and tenant in self._counters:
            self._counters[tenant] -= sequence.num_tokens
            self._refunds.setdefault(tenant, []).append((sequence.seq_id, sequence.num_tokens))

    def take_expired(self, now_s: float) -> Iterator[Sequence]:
        """Take out those that were never admitted, and whose deadline has passed."""
        while (first := self._deadlines.first()) is not None and first[0] <= now_s:
            self._deadlines.pop()
            sequence = self._members[first[1]]
            if not sequence.epoch:
                self.remove(sequence)
                yield sequence

    def _first_long(self) -> Sequence | None:
        """Of the lowest priority the longest expected output, if it is long.

        None passes a preempted sequence whose turn it is.
        """
        first = self._ranks.first()
        if self._long_output == inf or self._fair_share or first is None:
            return None
        longest = None if self._members[first[-1]].epoch else self._long_outputs.first()
        is_long = longest is not None and longest.num_expected_tokens >= self._long_output
        return longest if is_long else None

    def _forget(self, sequence: Sequence) -> None:
        del self._members[sequence.seq_id]
        self.num_tokens -= sequence.num_uncomputed_tokens
        self.num_token_steps -= _token_steps(sequence)
        tenant = sequence.request.tenant
        self._num_waiting[tenant] -= 1
        self._arrivals[tenant].pop(sequence.seq_id, None)
        if not self._num_waiting[tenant]:
            del self._num_waiting[tenant], self._arrivals[tenant]

    def _due(self, sequence: Sequence) -> float:
        """When a sequence that first waits is due, in tokens that came."""
        if not (self._fair_share or self._overtaking):
            return 0.0
        before = self._charge(sequence) if self._fair_share else self._num_tokens_before
        self._num_tokens_before += sequence.num_prompt_tokens
        return before + self._overtaking * sequence.num_prompt_tokens

    def _charge(self, sequence: Sequence) -> float:
        """Add a prompt to its tenant's counter; returns what the counter was."""
        self._apply_refunds()  # the counter has them already
        tenant = sequence.request.tenant
        counter = max(self._counters.get(tenant, 0.0), self._virtual_time)
        if len(self._counters) >= _MAX_COUNTERS:
            # Those that owe least are forgiven.
            items = nlargest(_MAX_COUNTERS // 2, self._counters.items(), key=itemgetter(1))
            self._counters = dict(items)
        self._counters[tenant] = counter + sequence.num_tokens
        self._arrivals[tenant][sequence.seq_id] = self._virtual_time
        return counter

    def _apply_refunds(self) -> None:
        """Rank those anew that were charged after others who left; none before its arrival."""
        for tenant, gone in self._refunds.items():
            gone_ids, totals = _running_totals(gone)
            for seq_id, arrived in self._arrivals.get(tenant, {}).items():
                if refund := totals[bisect(gone_ids, seq_id)]:
                    sequence = self._members[seq_id]
                    priority, due, _ = sequence.rank
                    earliest = arrived + self._overtaking * sequence.num_prompt_tokens
                    sequence.rank = (priority, max(due - refund, earliest), seq_id)
                    self._ranks.push(sequence.rank)
                    self._ages.push(sequence.rank[1:])
        self._refunds.clear()


def _token_steps(sequence: Sequence) -> int:
    """KV tokens a waiting sequence is expected to hold, summed over its decodes."""
    num_decodes = sequence.num_expected_tokens
    return num_decodes * sequence.num_tokens + num_decodes**2 // 2


def _running_totals(gone: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """The ids in order, and the tokens of those before each and of all."""
    gone.sort()
    return [seq_id for seq_id, _ in gone], [0, *accumulate(tokens for _, tokens in gone)]


def _is_rank(key: Rank, sequence: Sequence) -> bool:
    return sequence.rank == key


def _is_age(key: tuple[float, int], sequence: Sequence) -> bool:
    """Whether it is the rank without the priority."""
    return sequence.rank[1:] == key


class _LazyHeap(Generic[Key]):
    """Keys of members, smallest first; a key ends with its member's id.

    Keys that are out of date go when they come first, or when they are most of the heap.

    Args:
        members: By id.
        is_current: Whether a key is still its member's.
    """

    def __init__(
        self, members: dict[int, Sequence], is_current: Callable[[Key, Sequence], bool]
    ) -> None:
        self._members = members
        self._is_current = is_current
        self._keys: list[Key] = []

    def __iter__(self) -> Iterator[Key]:
        keys, last = self._keys.copy(), None
        while keys:
            key = heappop(keys)
            # A member that left and came back may have its key twice.
            if key != last and self._is_valid(key):
                yield key
                last = key

    def push(self, key: Key) -> None:
        heappush(self._keys, key)
        if len(self._keys) > _MIN_COMPACTED + 2 * len(self._members):
            self._keys = list({key for key in self._keys if self._is_valid(key)})
            heapify(self._keys)

    def first(self) -> Key | None:
        while self._keys and not self._is_valid(self._keys[0]):
            heappop(self._keys)
        return self._keys[0] if self._keys else None

    def pop(self) -> None:
        heappop(self._keys)

    def _is_valid(self, key: Key) -> bool:
        member = self._members.get(key[-1])
        return member is not None and self._is_current(key, member)
