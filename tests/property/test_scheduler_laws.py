"""The scheduler's laws, under random workloads, aborts, and result delays.

Hypothesis drives the scheduler as an engine would: it adds and aborts requests, submits
micro-batches, and commits results in submit order, each at a moment of its own choice. A model
of the stages checks every micro-batch on the way.

The prompts are made of few pieces, so that prefixes, and pieces after another prefix, recur.
"""

from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gllm_ray.errors import OverloadedError, PipelineError
from gllm_ray.messages import (
    FinishReason,
    GenerationRequest,
    LogitRules,
    MicroBatch,
    MicroBatchResult,
    SamplingParams,
    StageTime,
    TokenEvent,
)
from gllm_ray.policy_config import (
    BalancedConfig,
    ChunkedPrefillConfig,
    PolicyConfig,
    PrefillFirstConfig,
    TemporalConfig,
    TokenThrottlingConfig,
)
from gllm_ray.scheduling import QueueLimits
from gllm_ray.scheduling.length_predictor import StatisticsPredictor
from gllm_ray.scheduling.sequence import SequenceState
from tests.factories import make_scheduler, prompt_logprobs_of, told_of

BLOCK_SIZE = 4
MAX_MODEL_LEN = 48
MAX_PROMPT_LEN = 36
PIECES = ((1, 2, 3, 4, 5, 6, 7, 8), (9, 9, 9, 9), (9, 9, 9))


@dataclass(frozen=True)
class Setting:
    num_stages: int
    num_blocks: int
    extra_in_flight: int
    ring: bool
    max_decodes: int
    policy: PolicyConfig
    prefix_caching: bool = True
    fair_share: bool = False
    crowding: float = 1.0
    queue: QueueLimits = field(default_factory=QueueLimits)


@dataclass(frozen=True)
class Request:
    prompt: tuple[int, ...]
    max_tokens: int
    stops: bool
    cache_salt: str = ""
    priority: int = 0
    tenant: str = ""
    expected_output_tokens: int | None = None
    queue_timeout_s: float | None = None
    grammar: str = ""
    min_tokens: int = 0
    num_prompt_logprobs: int | None = None
    rules: LogitRules = LogitRules()  # noqa: RUF009 - it is a tuple

    @property
    def sampling(self):
        rules = self.rules._replace(min_end=len(self.prompt) + self.min_tokens)
        return SamplingParams(grammar=self.grammar, logit_rules=rules)


@dataclass(frozen=True)
class FollowUp:
    """A request whose prompt is that of an earlier one and the output it has so far."""

    index: int
    request: Request


def _throttling(options):
    if options["prefill_iterations"] is None:
        options["floor"] = "budget"  # Without a waiting term there is nothing else to bound.
    return TokenThrottlingConfig(**options)


token_throttling = st.fixed_dictionaries(
    {
        "max_prefill_tokens": st.integers(8, 64),
        "min_prefill_tokens": st.integers(1, 8),
        "prefill_iterations": st.integers(1, 8) | st.none(),
        "kv_term": st.booleans(),
        "kv_threshold": st.sampled_from([0.0, 0.05, 0.3, 0.9, 0.99, "adaptive"]),
        "floor": st.sampled_from(["budget", "waiting_term"]),
        "one_stage": st.sampled_from(["exempt", "throttled"]),
        "few_decodes": st.sampled_from(["one", "all"]),
        "count_prefills": st.booleans(),
    }
).map(_throttling)
chunked_prefill = st.builds(
    ChunkedPrefillConfig,
    token_budget=st.integers(1, 64),
    watermark=st.sampled_from([0.0, 0.01, 0.3, 0.9, 0.99]),
    tbt_target_s=st.none() | st.floats(0.001, 0.1),
)
prefill_first = st.builds(
    PrefillFirstConfig,
    token_budget=st.integers(1, 64),
    watermark=st.sampled_from([0.0, 0.01, 0.3, 0.99]),
)
temporal = st.builds(
    TemporalConfig,
    prefill_tokens=st.integers(1, 64),
    kv_limit=st.sampled_from([0.1, 0.5, 0.9]),
    watermark=st.sampled_from([0.0, 0.02, 0.5]),
)
balanced = st.builds(
    BalancedConfig,
    token_budget=st.integers(8, 64),
    min_prefill_tokens=st.integers(1, 8),
    tbt_target_s=st.none() | st.floats(0.001, 0.1),
)
settings_of_pipelines = st.builds(
    Setting,
    num_stages=st.integers(1, 4),
    num_blocks=st.integers(MAX_MODEL_LEN // BLOCK_SIZE, 40),
    extra_in_flight=st.integers(0, 1),
    ring=st.booleans(),
    max_decodes=st.integers(1, 8),
    policy=token_throttling | chunked_prefill | prefill_first | temporal | balanced,
    fair_share=st.booleans(),
    crowding=st.sampled_from([1.0, 1.2, 4.0]),
    queue=st.builds(
        QueueLimits,
        max_requests=st.none() | st.integers(1, 5),
        max_tokens=st.none() | st.integers(1, 60),
        timeout_s=st.none() | st.floats(0.5, 5),
    ),
)
without_limits = settings_of_pipelines.map(lambda s: replace(s, queue=QueueLimits()))
prompts = st.builds(
    lambda pieces, length: tuple(token for piece in pieces for token in piece)[:length],
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=8),
    st.integers(1, MAX_PROMPT_LEN),
)
requests = st.builds(
    Request,
    prompt=prompts,
    max_tokens=st.integers(1, 12),
    stops=st.booleans(),
    cache_salt=st.sampled_from(["", "", "tenant"]),
    priority=st.sampled_from([0, 0, 0, -1, 5]),
    tenant=st.sampled_from("abc"),
    expected_output_tokens=st.none() | st.integers(1, 20),
    grammar=st.sampled_from(["", "start: /[0-9]+/"]),
    min_tokens=st.sampled_from([0, 0, 1, 3]),
    num_prompt_logprobs=st.sampled_from([None, None, 0, 2]),
    rules=st.sampled_from(
        [
            LogitRules(),
            LogitRules(presence_penalty=1.0),
            LogitRules(repetition_penalty=1.1),
            LogitRules(bad_words=((1, 2),)),
        ]
    ),
)
# An action is a request to add, the index of one to abort, a number of results to commit, seconds
# that pass, or the loss of the stages and the requests that are then tried alone.
actions = st.lists(
    st.one_of(
        requests,
        st.builds(FollowUp, st.integers(0, 5), requests),
        st.builds(replace, requests, queue_timeout_s=st.floats(0.1, 3)),
        st.tuples(st.just("abort"), st.integers(0, 30)),
        st.tuples(st.just("commit"), st.integers(1, 3)),
        st.tuples(st.just("wait"), st.floats(0, 2)),
        st.tuples(st.just("lose"), st.none() | st.sets(st.integers(0, 30))),
    ),
    max_size=40,
)


class StageModel:
    """The KV cache of a stage: what a slot holds tells the salt and all tokens up to it.

    And what the last stage knows of sequences whose draws depend on it: the output so far.
    """

    def __init__(self):
        self.kv: dict[int, int] = {}
        self.outputs: dict[int, list[int]] = {}

    def execute(self, batch, tokens_of):
        """Write the KV of the whole micro-batch, then read what each sequence attends to."""
        written = {}
        for item in batch.sequences:
            chain = content_chain(*tokens_of(item))
            for position in range(item.start, item.end):
                written[slot_of(item, position)] = chain[position]
        assert len(written) == batch.num_tokens, "two rows write to one slot"
        self.kv |= written
        for source, target in batch.block_copies:
            for offset in range(BLOCK_SIZE):
                content = self.kv.get(source * BLOCK_SIZE + offset)
                self.kv[target * BLOCK_SIZE + offset] = content
        for item in batch.sequences:
            chain = content_chain(*tokens_of(item))
            read = [self.kv.get(slot_of(item, position)) for position in range(item.end)]
            assert read == chain[: item.end], "a sequence reads KV that is not its own"

    def follow(self, batch, result):
        """Learn what is told of such sequences, and what they draw; yields the outputs.

        Each comes with its sequence's share, before the token that is drawn.
        """
        for seq_id in batch.ended:
            self.outputs.pop(seq_id, None)
        sampled = [item for item in batch.sequences if item.sampling is not None]
        for item, token_id in zip(sampled, result.token_ids, strict=True):
            if item.output_token_ids is not None:
                self.outputs[item.seq_id] = [*item.output_token_ids]
            if item.sampling.needs_output:
                yield item, tuple(self.outputs[item.seq_id])
                self.outputs[item.seq_id].append(token_id)


def slot_of(item, position):
    return item.block_table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE


def content_chain(salt, tokens):
    contents, content = [], len(salt)
    for token in tokens:
        content = hash((content, token))
        contents.append(content)
    return contents


@dataclass
class Harness:
    """Drives a scheduler and checks each law where it can break."""

    setting: Setting
    in_flight: deque[MicroBatch] = field(default_factory=deque)
    results: deque[MicroBatchResult] = field(default_factory=deque)  # of those in flight
    now_s: float = 0.0
    requests: dict[str, GenerationRequest] = field(default_factory=dict)
    outputs: dict[str, list[int]] = field(default_factory=dict)
    ends: dict[str, FinishReason] = field(default_factory=dict)
    epochs: dict[int, int] = field(default_factory=dict)
    prompt_ends: dict[int, int] = field(default_factory=dict)  # of the epoch, output recomputed
    ends_scheduled: dict[int, int] = field(default_factory=dict)  # of the epoch
    first_starts: dict[str, int] = field(default_factory=dict)  # what each found at first
    owners: dict[int, set[int]] = field(default_factory=dict)  # of blocks, at the last check
    num_sampled: Counter[str] = field(default_factory=Counter)
    stage: StageModel = field(default_factory=StageModel)
    seen: Counter[str] = field(default_factory=Counter)
    log: list[MicroBatch | TokenEvent | float] = field(default_factory=list)

    def __post_init__(self):
        self.scheduler = make_scheduler(
            num_stages=self.setting.num_stages,
            num_blocks=self.setting.num_blocks,
            block_size=BLOCK_SIZE,
            max_model_len=MAX_MODEL_LEN,
            max_in_flight=self.max_in_flight,
            crowding=self.setting.crowding,
            ring=self.setting.ring,
            max_decodes=self.setting.max_decodes,
            policy=self.setting.policy,
            prefix_caching=self.setting.prefix_caching,
            fair_share=self.setting.fair_share,
            queue=self.setting.queue,
            predictor=StatisticsPredictor(),
        )

    @property
    def max_in_flight(self):
        return self.setting.num_stages + self.setting.extra_in_flight

    def run(self, todo):
        for action in todo:
            self.act(action)
            self.fill()
        self.drain()

    def drain(self):
        while not self.scheduler.is_idle:
            self.fill()
            # Law 2: not idle and nothing in flight => schedule() returned work.
            assert self.in_flight, "work waits and the pipeline is idle"
            self.commit()
        assert not self.in_flight

    def act(self, action):
        match action:
            case Request():
                self.add(action)
            case FollowUp():
                before = self.known_tokens(action.index) if self.requests else []
                prompt = (*before, *action.request.prompt)[:MAX_PROMPT_LEN]
                self.add(replace(action.request, prompt=prompt))
            case ("abort", index):
                self.apply(self.scheduler.abort(str(index)))
            case ("commit", count):
                for _ in range(min(count, len(self.in_flight))):
                    self.commit()
            case ("wait", seconds):
                self.now_s += seconds
                self.apply(self.scheduler.expire(self.now_s))
                deadline_s = self.scheduler.next_deadline_s
                assert deadline_s is None or deadline_s > self.now_s
            case ("lose", suspects):
                self.lose(suspects)

    def add(self, action):
        request = GenerationRequest(
            request_id=str(len(self.requests)),
            prompt_token_ids=action.prompt,
            max_tokens=action.max_tokens,
            stop_token_ids=frozenset({103, 117, 131}) if action.stops else frozenset(),
            cache_salt=action.cache_salt,
            priority=action.priority,
            tenant=action.tenant,
            expected_output_tokens=action.expected_output_tokens,
            queue_timeout_s=action.queue_timeout_s,
            num_prompt_logprobs=action.num_prompt_logprobs,
            sampling=action.sampling,
        )
        try:
            self.scheduler.add(request, self.now_s)
        except OverloadedError as error:
            self.log.append(error.retry_after_s)
            assert self.scheduler.num_waiting_requests > 0
        else:
            self.requests[request.request_id] = request
            self.outputs[request.request_id] = []

    def lose(self, suspects=None):
        """New stages replace the old ones, whose results come too late or never."""
        stale = deque(self.in_flight)
        in_flight = {str(item.seq_id) for batch in stale for item in batch.sequences}
        before = {s.seq_id: (s.epoch, s.block_table != (), s.rank) for s in self.scheduler._pool}
        self.in_flight.clear()
        self.results.clear()
        self.stage = StageModel()
        requeued = self.scheduler.requeue_all()
        aborted = {event.request_id for event in requeued.events}
        self.apply(requeued.events)
        # Every block is back, and nothing that the old stages held is found again.
        assert self.scheduler.kv_utilization == 0
        assert not self.scheduler._pool.allocator._blocks
        assert self.scheduler.num_in_flight == 0
        assert self.scheduler.num_waiting_requests == self.scheduler.num_requests
        # Law 6: who held blocks has a new epoch, and all have their place.
        for sequence in self.scheduler._pool:
            epoch, held, rank = before[sequence.seq_id]
            assert (sequence.epoch, sequence.rank) == (epoch + held, rank)
            assert not sequence.num_in_flight
        alive = in_flight - self.ends.keys()  # one that ended before may have ridden along
        assert requeued.lost == {n: len(self.outputs[n]) for n in alive}
        assert aborted <= in_flight
        for batch in stale:
            with pytest.raises(PipelineError):
                self.scheduler.commit(
                    MicroBatchResult(batch_id=batch.batch_id, token_ids=()), self.now_s
                )
        self.check_blocks()
        self.try_alone(suspects)

    def try_alone(self, suspects):
        """Let some requests run while all others wait."""
        if suspects is None:
            return
        admitted = {str(index) for index in suspects}
        self.scheduler.admit_only(admitted)
        while (batch := self.scheduler.schedule(self.now_s)) is not None or self.in_flight:
            if batch is None:
                self.commit()
                continue
            assert {str(item.seq_id) for item in batch.sequences} <= admitted
            self.submit(batch)
        # All of them that there were have ended: a trial is never stuck.
        assert admitted.isdisjoint(self.requests.keys() - self.ends.keys())
        self.scheduler.hold_back(frozenset())

    def known_tokens(self, index):
        request_id = str(index % len(self.requests))
        return [*self.requests[request_id].prompt_token_ids, *self.outputs[request_id]]

    def salt_and_tokens(self, item):
        return self.requests[str(item.seq_id)].cache_salt, self.tokens_of(item)

    def tokens_of(self, item):
        """Those known, and the one that the stages know first."""
        return self.known_tokens(item.seq_id) + self.tokens_ahead(item)

    def tokens_ahead(self, item):
        return [self.results[0].token_ids[~token] for token in item.token_ids if token < 0]

    def fill(self):
        while (batch := self.scheduler.schedule(self.now_s)) is not None:
            self.submit(batch)
        self.check_blocks()

    def submit(self, batch):
        self.check_batch(batch)
        self.in_flight.append(batch)
        self.log.append(batch)
        self.stage.execute(batch, self.salt_and_tokens)
        self.results.append(self.result_of(batch))
        self.check_outputs(batch, self.results[-1])
        self.check_blocks()

    def commit(self):
        self.now_s += 0.01
        batch = self.in_flight.popleft()
        self.num_sampled.update(
            str(item.seq_id) for item in batch.sequences if item.sampling is not None
        )
        self.apply(self.scheduler.commit(self.results.popleft(), self.now_s))
        self.check_blocks()

    def result_of(self, batch):
        """What the stages sample: a hash of the KV at the last position."""
        sampled = [item for item in batch.sequences if item.sampling is not None]
        last = [self.stage.kv[slot_of(item, item.end - 1)] for item in sampled]
        return MicroBatchResult(
            batch_id=batch.batch_id,
            token_ids=tuple(100 + content % 50 for content in last),
            prompt_logprobs=prompt_logprobs_of(batch),
            failures=tuple(
                (index, "no token may follow")
                for index, (item, content) in enumerate(zip(sampled, last, strict=True))
                if item.sampling.grammar and content % 20 == 0
            ),
            stage_times=tuple(
                StageTime(stage_id, batch.batch_id, 0.002 + 0.001 * batch.num_tokens)
                for stage_id in range(self.setting.num_stages)
            ),
        )

    def apply(self, events):
        for event in events:
            self.log.append(event)
            # Law 8: nothing comes after the terminal event.
            assert event.request_id not in self.ends
            if event.token_id is not None:
                assert event.token_id >= 0, "a token that is not known has left the scheduler"
                self.outputs[event.request_id].append(event.token_id)
            self.check_told(event)
            if event.finish_reason is not None:
                self.ends[event.request_id] = event.finish_reason

    def check_told(self, event):
        # Law 12: the first token tells what was found of the prompt at first, and what the model
        # found of it where that is asked for; no other event does.
        request_id, num_cached_tokens, logprobs = event.request_id, None, None
        request = self.requests[request_id]
        if event.token_id is not None and len(self.outputs[request_id]) == 1:
            num_cached_tokens = self.first_starts[request_id]
            assert num_cached_tokens < len(request.prompt_token_ids)
            if request.num_prompt_logprobs is not None:
                logprobs = told_of(request.prompt_token_ids[1:], request.num_prompt_logprobs)
        assert event.num_cached_tokens == num_cached_tokens
        assert event.prompt_logprobs == logprobs

    def check_batch(self, batch):
        # Law 3: at most max_in_flight micro-batches, and one more in the ring.
        assert len(self.in_flight) < self.max_in_flight + self.setting.ring
        assert batch.sequences
        seq_ids = [item.seq_id for item in batch.sequences]
        assert len(set(seq_ids)) == len(seq_ids)
        self.check_sources(batch)
        for item in batch.sequences:
            self.check_item(item, batch)
            self.check_writes(item)
        self.check_copies(batch)
        self.check_scored(batch)
        self.check_budget(batch)

    def check_outputs(self, batch, result):
        # Law 11: the last stage knows the output of each sequence whose draws depend on it, and is
        # told of each that ended, when it is in no micro-batch any more.
        alive = {item.seq_id for other in self.in_flight for item in other.sequences}
        assert alive.isdisjoint(batch.ended)
        assert {str(seq_id) for seq_id in batch.ended} <= self.ends.keys()
        for item, output in self.stage.follow(batch, result):
            prompt = self.requests[str(item.seq_id)].prompt_token_ids
            assert [*prompt, *output] == self.tokens_of(item)
            self.seen["told of output"] += bool(item.output_token_ids)
        for item in batch.sequences:
            if item.sampling is None or not item.sampling.needs_output:
                assert item.output_token_ids is None
            told = item.output_token_ids is not None and item.sampling.needs_prompt
            prompt = self.requests[str(item.seq_id)].prompt_token_ids if told else ()
            assert sorted(item.prompt_token_ids) == sorted(set(prompt))

    def check_sources(self, batch):
        # Law 3: a sequence that samples in flight is in no second micro-batch, unless that
        # continues the oldest one.
        sampling = [
            [item.seq_id for item in other.sequences if item.sampling is not None]
            for other in self.in_flight
        ]
        continued = {item.seq_id: item for item in batch.sequences if item.token_ids[0] < 0}
        for seq_ids in sampling:
            assert {item.seq_id for item in batch.sequences}.intersection(seq_ids) <= set(continued)
        for seq_id, item in continued.items():
            assert item.token_ids == (~sampling[0].index(seq_id),)
            assert not any(seq_id in seq_ids for seq_ids in sampling[1:])
        source = self.in_flight[0].batch_id if continued else None
        assert batch.continues == source
        self.seen["continued"] += len(continued)

    def check_copies(self, batch):
        sources = {source for source, _ in batch.block_copies}
        targets = [target for _, target in batch.block_copies]
        assert sources.isdisjoint(targets)
        assert len(set(targets)) == len(targets)
        last_blocks = {i.block_table[-1]: i for i in batch.sequences if i.sampling is not None}
        for target in targets:
            # The copy covers what its sequence writes in the same micro-batch.
            assert last_blocks[target].num_scheduled_tokens == 1
            self.seen["into a copy"] += 1

    def check_scored(self, batch):
        # Law 12: log probabilities are asked for of prompts that have no output, all of them.
        scored = {str(batch.sequences[index].seq_id) for index, *_ in batch.scored_chunks}
        for item in batch.sequences:
            request_id = str(item.seq_id)
            is_asked = self.requests[request_id].num_prompt_logprobs is not None
            is_prompt = item.token_ids[0] >= 0 and not self.outputs[request_id]
            assert (request_id in scored) == (is_asked and is_prompt)
            self.seen["told of a prompt anew"] += request_id in scored and item.epoch > 0

    def check_item(self, item, batch):
        request = self.requests[str(item.seq_id)]
        known = self.tokens_of(item)
        # Law 6: the epoch never falls; each starts behind full cached blocks, or in a copy of the
        # last one, and then has no gap.
        before = self.epochs.get(item.seq_id, -1)
        assert item.epoch >= before
        if item.epoch > before:
            targets = {target for _, target in batch.block_copies}
            if item.block_table[-1] in targets:
                assert item.start == len(known) - 1
            else:
                assert item.start % BLOCK_SIZE == 0
            self.epochs[item.seq_id] = item.epoch
            self.prompt_ends[item.seq_id] = len(known)
            self.first_starts.setdefault(str(item.seq_id), item.start)
            self.count_hit(item, request, batch)
        else:
            assert item.start == self.ends_scheduled[item.seq_id]
        self.ends_scheduled[item.seq_id] = item.end
        assert item.num_scheduled_tokens > 0
        # Law 1: blocks for every position the stages will touch, all of them distinct.
        assert len(item.block_table) * BLOCK_SIZE >= item.end
        assert len(set(item.block_table)) == len(item.block_table)
        # The tokens are those of the sequence, at their positions.
        assert (self.tokens_ahead(item) or list(item.token_ids)) == known[item.start : item.end]
        assert (item.sampling is not None) == (item.end == len(known))

    def check_writes(self, item):
        # Law 7: a block that others hold is written no more.
        for block in item.block_table[item.start // BLOCK_SIZE : -(-item.end // BLOCK_SIZE)]:
            others = self.owners.get(block, set()) - {item.seq_id}
            assert not any(
                block in sequence.block_table
                for sequence in self.scheduler._pool
                if sequence.seq_id in others
            )

    def count_hit(self, item, request, batch):
        """Note what kinds of hits the random workloads reach."""
        if item.start == 0:
            return
        last = item.block_table[item.start // BLOCK_SIZE - 1]
        in_flight = [other for batch in self.in_flight for other in batch.sequences]
        # Of the last block: the earlier ones were written no later.
        kinds = {
            "at first": item.epoch == 0,
            "after preemption": item.epoch > 0,
            "of a held block": last in self.owners,
            "of a block that no sequence holds": last not in self.owners,
            "in the micro-batch of the write": any(
                last in other.block_table[other.start // BLOCK_SIZE :]
                for other in batch.sequences
                if other is not item
            ),
            "while the write is in flight": any(
                last in other.block_table[other.start // BLOCK_SIZE :] for other in in_flight
            ),
            "of output": max(request.prompt_token_ids[: item.start]) >= 100,
            "of all but one token": item.start == self.prompt_ends[item.seq_id] - 1,
        }
        self.seen.update(kind for kind, is_seen in kinds.items() if is_seen)

    def check_budget(self, batch):
        # Law 10: within the bounds of the policy.
        num_decodes = sum(item.start >= self.prompt_ends[item.seq_id] for item in batch.sequences)
        num_prefill_tokens = batch.num_tokens - num_decodes
        assert num_decodes <= self.setting.max_decodes
        policy = self.scheduler._policy
        assert num_prefill_tokens <= policy.max_prefill_tokens
        assert batch.num_tokens <= self.setting.policy.max_batch_tokens(self.setting.max_decodes)
        match self.setting.policy:
            case ChunkedPrefillConfig(token_budget=limit):
                # It never stalls: where no decode runs, the whole budget is left for prefill.
                assert num_prefill_tokens <= max(0, limit - num_decodes)
            case TemporalConfig():
                # One phase or the other, whatever is still in flight.
                assert not (num_prefill_tokens and num_decodes)

    def check_blocks(self):
        pool = self.scheduler._pool
        self.check_references()
        # Law 5: what is in flight still owns the blocks it was given.
        for batch in self.in_flight:
            for item in batch.sequences:
                owner = pool[item.seq_id]
                assert owner.block_table[: len(item.block_table)] == item.block_table
                assert owner.epoch == item.epoch
        # Law 1: waiting holds none; prefilling holds blocks for its whole prompt.
        for sequence in pool.waiting:
            assert sequence.state is SequenceState.WAITING
            assert not sequence.block_table
        for sequence in pool.prefilling.values():
            assert len(sequence.block_table) * BLOCK_SIZE >= len(sequence.token_ids)
        self.check_backlog()

    def check_references(self):
        allocator = self.scheduler._pool.allocator
        places = defaultdict(list)
        for sequence in self.scheduler._pool:
            for index, block in enumerate(sequence.block_table):
                places[block].append((sequence, index))
        self.owners = {b: {s.seq_id for s, _ in held} for b, held in places.items()}
        # Law 7: used + free + cached is constant, and each reference has an owner.
        parts = [*places, *allocator._free, *allocator._cached]
        assert sorted(parts) == list(range(len(allocator._num_references)))
        assert allocator.num_free_blocks == self.setting.num_blocks - len(places)
        for block, num_references in enumerate(allocator._num_references):
            assert num_references == len(places.get(block, []))
        inverse = {content: b for b, contents in allocator._hashes.items() for content in contents}
        assert allocator._blocks == inverse
        assert allocator._cached.keys() <= allocator._hashes.keys()
        # Law 7: all owners of a block mean the same full block, at the same position.
        for held in places.values():
            contents = set()
            for sequence, index in held:
                end = (index + 1) * BLOCK_SIZE
                prefix = tuple(sequence.token_ids[:end])
                contents.add((sequence.request.cache_salt, prefix))
                if len(held) > 1:
                    assert len(prefix) == end <= sequence.num_computed_tokens
            assert len(contents) == 1

    def check_backlog(self):
        pool = self.scheduler._pool
        waiting = list(pool.waiting)
        assert len(waiting) == len(pool.waiting) == self.scheduler.num_waiting_requests
        assert waiting == sorted(waiting, key=lambda s: s.rank), "not in the order of admission"
        num_prefilling_tokens = sum(s.num_uncomputed_tokens for s in pool.prefilling.values())
        assert pool.num_prefilling_tokens == num_prefilling_tokens
        assert pool.waiting.num_tokens == sum(s.num_uncomputed_tokens for s in waiting)
        decoding = [s for s in pool if s.state is SequenceState.DECODING]
        not_anticipated = list(self.in_flight)[self.scheduler._flights._num_anticipated :]
        ending = {
            item.seq_id
            for batch in not_anticipated
            for item in batch.sequences
            if item.sampling is not None and item.start < self.prompt_ends[item.seq_id]
        }
        begun = [s for s in decoding if s.seq_id not in ending]
        view = self.scheduler._view(self.now_s)
        assert view.num_context_tokens == sum(len(s.token_ids) for s in begun)
        num_in_vain = sum(
            pool[item.seq_id].has_ended for batch in not_anticipated for item in batch.sequences
        )
        assert view.num_decoding == len(begun) + num_in_vain
        num_ending = sum(s.state is SequenceState.ENDING for s in pool)
        assert view.num_live == len(list(pool)) - len(waiting) - num_ending
        assert self.scheduler.num_requests == len(self.requests) - len(self.ends)
        assert pool.num_context_tokens == sum(len(s.token_ids) for s in decoding)
        assert pool.num_remaining_tokens == sum(
            s.request.max_tokens - s.num_output_tokens for s in decoding
        )


@settings(max_examples=300, deadline=None)
@given(settings_of_pipelines, actions)
def test_every_law_holds_under_random_workloads(setting, todo):
    harness = Harness(setting)
    harness.run(todo)
    # Law 8: every accepted request ended; law 7: every block came back.
    assert harness.ends.keys() == harness.requests.keys()
    assert harness.scheduler.kv_utilization == 0
    # Law 11: nothing that ended stays at the last stage.
    assert harness.stage.outputs.keys() <= set(harness.scheduler._pool.take_ended())
    check_ends(harness)


def check_ends(harness):
    """Law 8: each request ended for the reason that its tokens give."""
    for request_id, reason in harness.ends.items():
        request, output = harness.requests[request_id], harness.outputs[request_id]
        min_tokens = request.sampling.logit_rules.min_end - len(request.prompt_token_ids)
        if reason is FinishReason.STOP:
            assert output[-1] in request.stop_token_ids
            assert len(output) > min_tokens
        if reason is FinishReason.LENGTH:
            assert len(output) == request.max_tokens
        if reason is FinishReason.EXPIRED:
            assert not output
        assert not request.stop_token_ids.intersection(output[min_tokens:-1])
        if reason is FinishReason.BLAMED:
            assert request.sampling.grammar
        # At most one token was sampled in vain, and only after a stop token or one that is none.
        if reason is not FinishReason.ABORT:
            num_wasted = harness.num_sampled[request_id] - len(output)
            num_wasted -= reason is FinishReason.BLAMED
            is_surprise = reason in (FinishReason.STOP, FinishReason.BLAMED)
            assert 0 <= num_wasted <= (is_surprise and harness.setting.ring)


@settings(max_examples=50, deadline=None)
@given(settings_of_pipelines, actions)
def test_same_calls_give_the_same_decisions(setting, todo):
    first, second = Harness(setting), Harness(setting)
    first.run(todo)
    second.run(todo)
    assert first.log == second.log


@settings(max_examples=100, deadline=None)
@given(without_limits, st.lists(requests, min_size=1, max_size=12))
def test_preemption_chunking_and_prefix_caching_do_not_change_the_tokens(setting, todo):
    squeezed = Harness(setting)
    squeezed.run(todo)
    roomy = Harness(
        Setting(
            num_stages=1,
            num_blocks=1000,
            extra_in_flight=0,
            ring=False,
            max_decodes=512,
            policy=TokenThrottlingConfig(),
            prefix_caching=False,
        )
    )
    roomy.run(todo)
    assert roomy.scheduler.load().num_preemptions == 0
    assert roomy.scheduler.load().num_prefix_queried_tokens == 0
    assert squeezed.outputs == roomy.outputs
    assert squeezed.ends == roomy.ends


@settings(max_examples=100, deadline=None)
@given(
    without_limits,
    st.lists(st.one_of(requests, st.tuples(st.just("lose"), st.none())), min_size=1, max_size=20),
)
def test_lost_stages_do_not_change_the_tokens(setting, todo):
    disturbed, undisturbed = Harness(setting), Harness(setting)
    disturbed.run(todo)
    undisturbed.run([action for action in todo if isinstance(action, Request)])
    assert disturbed.outputs == undisturbed.outputs
    assert disturbed.ends == undisturbed.ends


@settings(max_examples=100, deadline=None)
@given(settings_of_pipelines, actions)
def test_a_request_that_is_failed_ends_alone_and_once(setting, todo):
    harness = Harness(setting)
    for action in todo:
        harness.act(action)
        harness.fill()
    harness.lose()
    for request_id in list(harness.requests)[::2]:
        events = harness.scheduler.fail(request_id, "it is to blame")
        assert len(events) == (request_id not in harness.ends)
        harness.apply(events)
        assert all(e.finish_reason is FinishReason.BLAMED and e.error for e in events)
    harness.drain()
    assert harness.ends.keys() == harness.requests.keys()
    assert harness.scheduler.kv_utilization == 0


@settings(max_examples=100, deadline=None)
@given(settings_of_pipelines, actions)
def test_failure_ends_every_open_request_once_and_voids_every_block(setting, todo):
    harness = Harness(setting)
    for action in todo:
        harness.act(action)
        harness.fill()
    open_requests = harness.requests.keys() - harness.ends.keys()
    events = harness.scheduler.fail_all("stage 1 is gone")
    assert sorted(event.request_id for event in events) == sorted(open_requests)
    assert all(event.finish_reason is FinishReason.ERROR for event in events)
    assert all(event.error == "stage 1 is gone" for event in events)
    assert harness.scheduler.is_idle
    assert harness.scheduler.kv_utilization == 0
    harness.apply(events)
    harness.in_flight.clear()
    harness.results.clear()
    harness.check_backlog()
    # New stages begin with an empty KV cache, and the same prompts come again.
    harness.stage = StageModel()
    harness.run(todo)
    assert harness.ends.keys() == harness.requests.keys()


def test_random_workloads_reach_every_kind_of_hit():
    seen = Counter()

    @settings(max_examples=600, deadline=None, derandomize=True, database=None)
    @given(without_limits.map(lambda s: replace(s, num_blocks=min(s.num_blocks, 16))), actions)
    def explore(setting, todo):
        harness = Harness(setting)
        harness.run(todo)
        seen.update(harness.seen)

    explore()
    assert len(seen) == 12
    assert min(seen.values()) >= 2, seen
