"""Defects known of gLLM's and Sarathi-Serve's schedulers, and that ours has none of them."""

import pytest

from gllm_ray.errors import InvalidRequestError
from gllm_ray.messages import FinishReason
from gllm_ray.policy_config import ChunkedPrefillConfig, TokenThrottlingConfig
from tests.factories import make_request, make_scheduler, result_of

THROTTLING = TokenThrottlingConfig(min_prefill_tokens=16, max_prefill_tokens=64)
ADAPTIVE = TokenThrottlingConfig(kv_threshold="adaptive", max_prefill_tokens=64)
CHUNKED = ChunkedPrefillConfig(token_budget=16)
each_policy = pytest.mark.parametrize(
    "policy", [THROTTLING, ADAPTIVE, CHUNKED], ids=["throttling", "adaptive", "chunked"]
)


def prefilled(names, *, num_prompt_tokens=4, max_tokens=16, **options):
    """A scheduler in which every named request is ready to decode."""
    scheduler = make_scheduler(**options)
    for name in names:
        scheduler.add(
            make_request(name, num_prompt_tokens=num_prompt_tokens, max_tokens=max_tokens)
        )
    while scheduler.num_waiting_tokens:
        scheduler.commit(result_of(scheduler.schedule()))
    return scheduler


def run_to_end(scheduler):
    """The last event of every request."""
    ends, in_flight = {}, []
    while not scheduler.is_idle:
        while (batch := scheduler.schedule()) is not None:
            in_flight.append(batch)
        for event in scheduler.commit(result_of(in_flight.pop(0))):
            if event.finish_reason is not None:
                assert event.request_id not in ends
                ends[event.request_id] = event.finish_reason
    return ends


@each_policy
def test_decodes_go_on_where_the_kv_cache_has_no_room_for_prefill(policy):
    scheduler = prefilled("ab", num_prompt_tokens=15, num_blocks=9, num_stages=1, policy=policy)
    scheduler.add(make_request("waits", num_prompt_tokens=8))
    batch = scheduler.schedule()
    assert [item.seq_id for item in batch.sequences] == [0, 1]
    assert scheduler.num_preemptions == 0


@pytest.mark.parametrize(
    "policy",
    [TokenThrottlingConfig(kv_threshold=0.0), ChunkedPrefillConfig(watermark=0.0)],
    ids=["throttling", "chunked"],
)
def test_a_decode_with_room_in_its_last_block_preempts_nobody(policy):
    """gLLM and Sarathi-Serve ask for a free block for every decode, needed or not."""
    scheduler = prefilled(
        "ab", num_prompt_tokens=5, max_tokens=8, num_blocks=4, num_stages=1, policy=policy
    )
    assert scheduler.kv_utilization == 1
    for _ in range(2):  # positions 6 and 7, in blocks of 4
        batch = scheduler.schedule()
        assert len(batch.sequences) == 2
        scheduler.commit(result_of(batch))
    assert scheduler.num_preemptions == 0


@each_policy
def test_a_micro_batch_without_waiting_prompts_holds_decodes_alone(policy):
    scheduler = prefilled("abcd", num_stages=1, policy=policy)
    assert [item.num_scheduled_tokens for item in scheduler.schedule().sequences] == [1] * 4


def test_fewer_decodes_than_stages_overlap_instead_of_riding_together():
    scheduler = prefilled("abc", num_stages=4)
    assert [len(scheduler.schedule().sequences) for _ in range(3)] == [1, 1, 1]


@each_policy
def test_the_next_chunk_of_a_prompt_does_not_wait_for_the_last_one(policy):
    """In Sarathi-Serve, and in gLLM until July 2025, it waits for the whole pipeline."""
    scheduler = make_scheduler(num_stages=4, num_blocks=128, max_model_len=256, policy=policy)
    scheduler.add(make_request(num_prompt_tokens=225))
    batches = [scheduler.schedule() for _ in range(4)]
    ends = [batch.sequences[0].end for batch in batches]
    assert [batch.sequences[0].start for batch in batches] == [0, *ends[:-1]]


@each_policy
def test_an_abort_frees_no_block_while_any_chunk_is_in_flight(policy):
    """gLLM frees the pages of a sequence while another chunk of it is in flight."""
    scheduler = make_scheduler(num_stages=2, policy=policy)
    scheduler.add(make_request(num_prompt_tokens=100))
    first, second = scheduler.schedule(), scheduler.schedule()
    held = scheduler.kv_utilization
    assert scheduler.abort("a") == []
    assert scheduler.commit(result_of(first)) == []
    assert scheduler.kv_utilization == held > 0
    (event,) = scheduler.commit(result_of(second))
    assert event.finish_reason is FinishReason.ABORT
    assert scheduler.kv_utilization == 0


@each_policy
def test_a_prompt_that_can_never_fit_blocks_nobody(policy):
    """In gLLM it stays at the head of the queue."""
    scheduler = make_scheduler(num_blocks=8, max_model_len=1000, policy=policy)
    with pytest.raises(InvalidRequestError, match="limit is 33"):
        scheduler.add(make_request("never", num_prompt_tokens=33))
    scheduler.add(make_request("fits", num_prompt_tokens=28, max_tokens=4))
    assert run_to_end(scheduler) == {"fits": FinishReason.LENGTH}


@each_policy
def test_two_prompts_that_fill_the_cache_together_do_not_wait_for_each_other(policy):
    """Partly admitted prompts could each hold what the other needs."""
    scheduler = make_scheduler(num_blocks=16, num_stages=4, policy=policy)
    for name in "abc":
        scheduler.add(make_request(name, num_prompt_tokens=50, max_tokens=8))
    assert run_to_end(scheduler) == dict.fromkeys("abc", FinishReason.LENGTH)


@each_policy
def test_the_decode_that_waited_longest_runs_next(policy):
    """gLLM's queue is last in, first out; here every decode runs once before one runs twice."""
    scheduler = prefilled("abcdefgh", num_stages=1, max_decodes=3, policy=policy)
    order = []
    for _ in range(8):
        batch = scheduler.schedule()
        order += [item.seq_id for item in batch.sequences]
        scheduler.commit(result_of(batch))
    rounds = [order[start : start + 8] for start in range(0, 24, 8)]
    assert all(sorted(round_) == list(range(8)) for round_ in rounds)


def test_the_remainder_of_the_decodes_rotates_without_chance():
    """gLLM drew it at random, so that tensor-parallel peers disagreed and waited for ever."""
    traces = []
    for _ in range(2):
        scheduler = prefilled("abcdef", num_stages=4)
        traces.append([len(scheduler.schedule().sequences) for _ in range(4)])
    assert traces[0] == traces[1]
    assert sum(traces[0]) == 6


def chunked_with_31_decodes(**options):
    """Nearly twice the budget, prefilled by two micro-batches, and a prompt under way."""
    scheduler = make_scheduler(num_stages=2, policy=CHUNKED, **options)
    for index in range(31):
        scheduler.add(make_request(str(index), num_prompt_tokens=1))
    scheduler.add(make_request("under way", num_prompt_tokens=9))
    for batch in [scheduler.schedule(), scheduler.schedule()]:
        scheduler.commit(result_of(batch))
    return scheduler


def test_more_decodes_than_the_token_budget_leave_no_negative_chunk():
    """Sarathi-Serve's test for an empty chunk is `== 0`, and the rest of its budget negative."""
    scheduler = chunked_with_31_decodes()
    batch = scheduler.schedule()
    assert [item.num_scheduled_tokens for item in batch.sequences] == [1] * 31
    assert scheduler._pool.num_prefilling_tokens == 8
    scheduler.commit(result_of(batch))
    assert len(run_to_end(scheduler)) == 32


def test_decodes_beyond_the_token_budget_are_bounded_by_max_decodes():
    """Sarathi-Serve never cuts them; here the operator says how many run at once."""
    scheduler = chunked_with_31_decodes(max_decodes=20)
    assert [scheduler.schedule().num_tokens for _ in range(2)] == [20, 11 + 5]
    assert CHUNKED.max_batch_tokens(max_decodes=20) == 20


@each_policy
def test_no_victim_is_in_flight_and_each_starts_over_with_a_higher_epoch(policy):
    """Sarathi-Serve may apply a result from before the preemption to a re-admitted sequence."""
    scheduler = make_scheduler(num_stages=2, num_blocks=16, policy=policy)
    for name in "abcd":
        scheduler.add(make_request(name, num_prompt_tokens=12, max_tokens=24))
    in_flight, epochs = [], {}
    while not scheduler.is_idle:
        while (batch := scheduler.schedule()) is not None:
            in_flight.append(batch)
            for item in batch.sequences:
                if item.epoch != epochs.get(item.seq_id, 0):
                    assert item.epoch > epochs.get(item.seq_id, 0)
                    assert item.start == 0
                epochs[item.seq_id] = item.epoch
            for item in (item for other in in_flight for item in other.sequences):
                assert scheduler._pool[item.seq_id].epoch == item.epoch
        scheduler.commit(result_of(in_flight.pop(0)))
    assert scheduler.num_preemptions > 0
    assert sum(epochs.values()) == scheduler.num_preemptions


@each_policy
def test_one_more_micro_batch_than_stages_may_be_in_flight(policy):
    """With exactly as many, each delay of the engine is a bubble; the operator chooses."""
    scheduler = make_scheduler(num_stages=2, max_in_flight=3, policy=policy)
    scheduler.add(make_request(num_prompt_tokens=100))
    assert [scheduler.schedule() is not None for _ in range(4)] == [True, True, True, False]
