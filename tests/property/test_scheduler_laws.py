"""The scheduler's laws, under random workloads, aborts, and result delays.

Hypothesis drives the scheduler as an engine would: it adds and aborts requests, submits
micro-batches, and commits results in submit order, each at a moment of its own choice. A model
of the stages checks every micro-batch on the way.
"""

from collections import deque
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from gllm_ray.messages import FinishReason, GenerationRequest, MicroBatch, TokenEvent
from gllm_ray.policy_config import ChunkedPrefillConfig, PolicyConfig, TokenThrottlingConfig
from gllm_ray.scheduling.sequence import SequenceState
from tests.factories import make_scheduler, result_of

BLOCK_SIZE = 4
MAX_MODEL_LEN = 48


@dataclass(frozen=True)
class Setting:
    num_stages: int
    num_blocks: int
    extra_in_flight: int
    max_decodes: int
    policy: PolicyConfig


@dataclass(frozen=True)
class Request:
    num_prompt_tokens: int
    max_tokens: int
    stops: bool


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
)
settings_of_pipelines = st.builds(
    Setting,
    num_stages=st.integers(1, 4),
    num_blocks=st.integers(MAX_MODEL_LEN // BLOCK_SIZE, 40),
    extra_in_flight=st.integers(0, 1),
    max_decodes=st.integers(1, 8),
    policy=token_throttling | chunked_prefill,
)
requests = st.builds(
    Request,
    num_prompt_tokens=st.integers(1, 36),
    max_tokens=st.integers(1, 12),
    stops=st.booleans(),
)
# An action is a request to add, the index of one to abort, or a number of results to commit.
actions = st.lists(
    st.one_of(
        requests,
        st.tuples(st.just("abort"), st.integers(0, 30)),
        st.tuples(st.just("commit"), st.integers(1, 3)),
    ),
    max_size=40,
)


@dataclass
class Harness:
    """Drives a scheduler and checks each law where it can break."""

    setting: Setting
    in_flight: deque[MicroBatch] = field(default_factory=deque)
    requests: dict[str, GenerationRequest] = field(default_factory=dict)
    outputs: dict[str, list[int]] = field(default_factory=dict)
    ends: dict[str, FinishReason] = field(default_factory=dict)
    epochs: dict[int, int] = field(default_factory=dict)
    prompt_ends: dict[int, int] = field(default_factory=dict)  # of the epoch, output recomputed
    log: list[MicroBatch | TokenEvent] = field(default_factory=list)

    def __post_init__(self):
        self.scheduler = make_scheduler(
            num_stages=self.setting.num_stages,
            num_blocks=self.setting.num_blocks,
            block_size=BLOCK_SIZE,
            max_model_len=MAX_MODEL_LEN,
            max_in_flight=self.max_in_flight,
            max_decodes=self.setting.max_decodes,
            policy=self.setting.policy,
        )

    @property
    def max_in_flight(self):
        return self.setting.num_stages + self.setting.extra_in_flight

    def run(self, todo):
        for action in todo:
            self.act(action)
            self.fill()
        while not self.scheduler.is_idle:
            self.fill()
            # Law 2: not idle and nothing in flight => schedule() returned work.
            assert self.in_flight, "work waits and the pipeline is idle"
            self.commit()
        assert not self.in_flight

    def act(self, action):
        match action:
            case Request():
                request_id = str(len(self.requests))
                request = GenerationRequest(
                    request_id=request_id,
                    prompt_token_ids=tuple(range(1, action.num_prompt_tokens + 1)),
                    max_tokens=action.max_tokens,
                    stop_token_ids=frozenset({103, 117, 131}) if action.stops else frozenset(),
                )
                self.requests[request_id] = request
                self.outputs[request_id] = []
                self.scheduler.add(request)
            case ("abort", index):
                self.apply(self.scheduler.abort(str(index)))
            case ("commit", count):
                for _ in range(min(count, len(self.in_flight))):
                    self.commit()

    def fill(self):
        while (batch := self.scheduler.schedule()) is not None:
            self.check_batch(batch)
            self.in_flight.append(batch)
            self.log.append(batch)
        self.check_blocks()

    def commit(self):
        self.apply(self.scheduler.commit(result_of(self.in_flight.popleft())))
        self.check_blocks()

    def apply(self, events):
        for event in events:
            self.log.append(event)
            # Law 8: nothing comes after the terminal event.
            assert event.request_id not in self.ends
            if event.token_id is not None:
                self.outputs[event.request_id].append(event.token_id)
            if event.finish_reason is not None:
                self.ends[event.request_id] = event.finish_reason

    def check_batch(self, batch):
        # Law 3: at most max_in_flight micro-batches.
        assert len(self.in_flight) < self.max_in_flight
        assert batch.sequences
        seq_ids = [item.seq_id for item in batch.sequences]
        assert len(set(seq_ids)) == len(seq_ids)
        sampling_in_flight = {
            item.seq_id
            for other in self.in_flight
            for item in other.sequences
            if item.sampling is not None
        }
        # Law 3: a sequence that samples in flight is in no second micro-batch.
        assert sampling_in_flight.isdisjoint(seq_ids)
        for item in batch.sequences:
            self.check_item(item)
        self.check_budget(batch)

    def check_item(self, item):
        # Law 6: the epoch never falls, and a raised one starts over.
        before = self.epochs.setdefault(item.seq_id, 0)
        assert item.epoch >= before
        if item.epoch > before:
            assert item.start == 0
            self.epochs[item.seq_id] = item.epoch
        assert item.num_scheduled_tokens > 0
        # Law 1: blocks for every position the stages will touch, all of them distinct.
        assert len(item.block_table) * BLOCK_SIZE >= item.end
        assert len(set(item.block_table)) == len(item.block_table)
        # The tokens are those of the sequence, at their positions.
        request = self.requests[str(item.seq_id)]
        known = list(request.prompt_token_ids) + self.outputs[request.request_id]
        assert list(item.token_ids) == known[item.start : item.end]
        if item.start == 0:
            self.prompt_ends[item.seq_id] = len(known)
        assert (item.sampling is not None) == (item.end == len(known))

    def check_budget(self, batch):
        # Law 10: within the policy's bounds, except the one batch that ends a stall.
        num_decodes = sum(item.start >= self.prompt_ends[item.seq_id] for item in batch.sequences)
        num_prefill_tokens = batch.num_tokens - num_decodes
        assert num_decodes <= self.setting.max_decodes
        match self.setting.policy:
            case TokenThrottlingConfig(max_prefill_tokens=limit):
                assert num_prefill_tokens <= (limit if self.in_flight else max(limit, 256))
            case ChunkedPrefillConfig(token_budget=limit):
                # It never stalls: where no decode runs, the whole budget is left for prefill.
                assert num_prefill_tokens <= max(0, limit - num_decodes)
                assert batch.num_tokens <= self.setting.policy.max_batch_tokens(
                    self.setting.max_decodes
                )

    def check_blocks(self):
        scheduler = self.scheduler
        allocator = scheduler._allocator
        held = [b for s in scheduler._sequences.values() for b in s.block_table]
        # Law 7: no block has two owners, and used + free is constant.
        assert len(set(held)) == len(held)
        assert sorted([*held, *allocator._free]) == list(range(self.setting.num_blocks))
        # Law 5: what is in flight still owns the blocks it was given.
        for batch in self.in_flight:
            for item in batch.sequences:
                owner = scheduler._sequences[item.seq_id]
                assert tuple(owner.block_table[: len(item.block_table)]) == item.block_table
                assert owner.epoch == item.epoch
        # Law 1: waiting holds none; prefilling holds blocks for its whole prompt.
        for sequence in scheduler._waiting:
            assert sequence.state is SequenceState.WAITING
            assert not sequence.block_table
        for sequence in scheduler._prefilling.values():
            assert len(sequence.block_table) * BLOCK_SIZE >= len(sequence.token_ids)
        self.check_backlog()

    def check_backlog(self):
        scheduler = self.scheduler
        waiting = list(scheduler._waiting)
        assert waiting == sorted(waiting, key=lambda s: s.seq_id), "not in order of arrival"
        assert scheduler._num_waiting_tokens == sum(s.num_uncomputed_tokens for s in waiting)
        assert scheduler._num_prefilling_tokens == sum(
            s.num_uncomputed_tokens for s in scheduler._prefilling.values()
        )
        assert scheduler._num_remaining_tokens == sum(
            s.request.max_tokens - s.num_output_tokens
            for s in scheduler._sequences.values()
            if s.state is SequenceState.DECODING
        )


@settings(max_examples=300, deadline=None)
@given(settings_of_pipelines, actions)
def test_every_law_holds_under_random_workloads(setting, todo):
    harness = Harness(setting)
    harness.run(todo)
    # Law 8: every accepted request ended; law 7: every block came back.
    assert harness.ends.keys() == harness.requests.keys()
    assert harness.scheduler.kv_utilization == 0
    for request_id, reason in harness.ends.items():
        request, output = harness.requests[request_id], harness.outputs[request_id]
        if reason is FinishReason.STOP:
            assert output[-1] in request.stop_token_ids
        if reason is FinishReason.LENGTH:
            assert len(output) == request.max_tokens
        assert not request.stop_token_ids.intersection(output[:-1])


@settings(max_examples=50, deadline=None)
@given(settings_of_pipelines, actions)
def test_same_calls_give_the_same_decisions(setting, todo):
    first, second = Harness(setting), Harness(setting)
    first.run(todo)
    second.run(todo)
    assert first.log == second.log


@settings(max_examples=100, deadline=None)
@given(settings_of_pipelines, st.lists(requests, min_size=1, max_size=12))
def test_preemption_and_chunking_do_not_change_the_tokens(setting, todo):
    squeezed = Harness(setting)
    squeezed.run(todo)
    roomy = Harness(
        Setting(
            num_stages=1,
            num_blocks=1000,
            extra_in_flight=0,
            max_decodes=512,
            policy=TokenThrottlingConfig(),
        )
    )
    roomy.run(todo)
    assert roomy.scheduler.num_preemptions == 0
    assert squeezed.outputs == roomy.outputs
    assert squeezed.ends == roomy.ends


@settings(max_examples=100, deadline=None)
@given(settings_of_pipelines, actions)
def test_failure_ends_every_open_request_once_and_returns_every_block(setting, todo):
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
    harness.check_backlog()
