"""Defects known of the schedulers of gLLM, Sarathi-Serve and TD-Pipe; ours has none of them."""

import pytest

from gllm_ray.errors import InvalidRequestError
from gllm_ray.messages import FinishReason
from gllm_ray.policy_config import ChunkedPrefillConfig, TemporalConfig, TokenThrottlingConfig
from gllm_ray.scheduling.kv_forecast import KvForecast
from gllm_ray.scheduling.policies.temporal import TemporalPolicy
from tests.factories import make_request, make_scheduler, result_of
from tests.unit.scheduling.profiles import L20_LLAMA_13B
from tests.unit.scheduling.views import Length, view_of

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
    while scheduler.load().num_waiting_tokens:
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
    assert scheduler.load().num_preemptions == 0


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
    assert scheduler.load().num_preemptions == 0


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
    assert scheduler.load().num_preemptions > 0
    assert sum(epochs.values()) == scheduler.load().num_preemptions


@each_policy
def test_one_more_micro_batch_than_stages_may_be_in_flight(policy):
    """With exactly as many, each delay of the engine is a bubble; the operator chooses."""
    scheduler = make_scheduler(num_stages=2, max_in_flight=3, policy=policy)
    scheduler.add(make_request(num_prompt_tokens=100))
    assert [scheduler.schedule() is not None for _ in range(4)] == [True, True, True, False]


# ---- TD-Pipe


def peak_blocks(*lengths):
    forecast = KvForecast(block_size=16)
    for num_tokens, num_expected_tokens in lengths:
        forecast.add(Length(num_tokens, num_expected_tokens))
    return forecast.peak_blocks()


def decoding(num_live, waiting=(), batch_id=0, **changes):
    """Llama 13B on four L20, with sequences of 180 tokens that end in 50."""
    load = {"cost": L20_LLAMA_13B, "num_blocks": 100_000, "batch_id": batch_id}
    return view_of([(180, 50)] * num_live, list(waiting), **(load | changes))


def shares(contexts):
    """The numbers of decodes of a round of 4 micro-batches when all are ready at first."""
    policy, left, sizes = TemporalPolicy(TemporalConfig()), list(contexts), []
    for batch_id in range(4):
        budget = policy.budget(
            view_of([(context, 50) for context in contexts], batch_id=batch_id, num_blocks=10_000)
        )
        sizes.append(len(left[: budget.decodes]))
        del left[: budget.decodes]
    return sizes


def test_sequences_that_outgrew_their_prediction_keep_their_blocks_in_the_forecast():
    """TD-Pipe counts 50 of them, of 1,100 tokens each, as 0 blocks."""
    for num_expected_tokens in (1, 4, 900):
        assert peak_blocks(*[(1100, num_expected_tokens)] * 50) >= 3450


def test_predictions_are_not_rounded_down_to_a_power_of_two():
    """TD-Pipe's peak is 23 blocks for both."""
    assert (peak_blocks((100, 300)), peak_blocks((100, 511))) == (25, 39)


def test_the_output_of_a_preempted_sequence_counts_once_in_the_forecast():
    """TD-Pipe adds all of its prediction to the tokens it holds already."""
    prompt, predicted, generated = 100, 300, 200
    assert peak_blocks((prompt + generated, predicted - generated)) == peak_blocks((100, 300))


def test_small_numbers_of_decodes_do_not_alternate():
    """With 10, TD-Pipe dispatches 3 and 7; with 7, 2 and 5; with 5, all in one."""
    assert [shares([100] * n) for n in (10, 7, 5)] == [[3, 3, 2, 2], [2, 2, 2, 1], [2, 1, 1, 1]]


def test_as_many_decodes_as_stages_keep_every_stage_busy():
    """TD-Pipe takes at least 2, so that fewer micro-batches than stages are in flight."""
    assert [shares([100] * n) for n in (4, 3)] == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_prefill_and_decode_times_are_of_one_stage_when_compared():
    """TD-Pipe's share of the phase that is no bubble is 2.21 for one prompt, 1.05 for 100."""
    policy = TemporalPolicy(TemporalConfig(prefill_tokens=180))
    values = [
        policy._temporal_intensity(decoding(340), [180] * num_prompts, 340 + num_prompts, 0)
        for num_prompts in (1, 100)
    ]
    assert [round(value, 2) for value in values] == [0.74, 0.99]


def test_the_token_rate_of_decodes_does_not_fall_where_a_tile_begins():
    """TD-Pipe's spatial intensity is 0.73 at 128 decodes, 0.59 at 129, and 1 from 192 on."""
    policy = TemporalPolicy(TemporalConfig())
    at = [policy._spatial_intensity(decoding(0), 4 * size) for size in (128, 129, 160, 192, 256)]
    assert at == sorted(at)
    assert [round(value, 2) for value in at] == [0.73, 0.73, 0.73, 0.76, 1]


@pytest.mark.parametrize("num_live", [0, 1, 3])
def test_fewer_decodes_than_stages_may_end_their_phase(num_live):
    """TD-Pipe raises a KeyError."""
    policy = TemporalPolicy(TemporalConfig(min_finished_ratio=0))
    assert policy.budget(decoding(40)).decodes > 0
    assert policy.budget(decoding(num_live, [(180, 50)], batch_id=4)).prefill_tokens > 0


def test_decodes_that_will_need_the_whole_cache_go_on():
    """TD-Pipe divides by zero: no prompt would be added."""
    policy = TemporalPolicy(TemporalConfig(min_finished_ratio=0))
    for batch_id in range(9):
        load = decoding(8, [(180, 50)], batch_id, num_blocks=8 * 15)
        assert policy.budget(load).decodes > 0


def test_a_cache_between_two_limits_does_not_flip_the_phase():
    """TD-Pipe leaves prefill at 0.9 but enters it up to 1.0, for one micro-batch, every round."""
    policy = TemporalPolicy(TemporalConfig(min_finished_ratio=0))
    for batch_id in range(20):
        load = decoding(8, [(180, 50)], batch_id, num_blocks=126)  # the live need 120 at the peak
        budget = policy.budget(load)
        assert budget.decodes > 0
        assert budget.prefill_tokens == 0


def test_one_long_prompt_does_not_set_the_time_of_every_micro_batch():
    """TD-Pipe prefills a prompt whole, and the stages behind it wait."""
    policy = TemporalPolicy(TemporalConfig())
    budget = policy.budget(view_of(waiting=[(8000, 10), (180, 50)], num_blocks=10_000))
    assert budget.prefill_tokens == policy.max_prefill_tokens == 512
