from dataclasses import asdict, replace

import pytest

from gllm_ray.errors import InvalidRequestError, PipelineError
from gllm_ray.messages import FinishReason, MicroBatchResult, StageTime
from gllm_ray.policy_config import (
    BalancedConfig,
    ChunkedPrefillConfig,
    TokenThrottlingConfig,
)
from gllm_ray.scheduling.cost_model import LinearCostModel
from gllm_ray.scheduling.length_predictor import StatisticsPredictor
from gllm_ray.scheduling.load import StepLoad
from gllm_ray.scheduling.sequence import Sequence
from tests.factories import make_request, make_scheduler, result_of


def test_consecutive_chunks_of_one_prompt_fill_the_pipeline():
    policy = TokenThrottlingConfig(
        max_prefill_tokens=16, min_prefill_tokens=16, prefill_iterations=1
    )
    scheduler = make_scheduler(num_stages=4, policy=policy)
    scheduler.add(make_request(num_prompt_tokens=64))
    batches = [scheduler.schedule() for _ in range(4)]
    assert [(b.sequences[0].start, b.sequences[0].end) for b in batches] == [
        (0, 16),
        (16, 32),
        (32, 48),
        (48, 64),
    ]
    assert [b.sequences[0].sampling is not None for b in batches] == [False, False, False, True]
    assert scheduler.schedule() is None


def test_decodes_are_spread_over_as_many_micro_batches_as_stages():
    scheduler = make_scheduler(num_stages=4, num_blocks=256)
    for name in "abcdefgh":
        scheduler.add(make_request(name, num_prompt_tokens=4, max_tokens=16))
    while scheduler.load().num_waiting_tokens:
        scheduler.commit(result_of(scheduler.schedule()))
    batches = [scheduler.schedule() for _ in range(4)]
    assert [len(b.sequences) for b in batches] == [2, 2, 2, 2]


def test_where_stages_share_processors_sequences_that_began_apart_decode_together():
    cost = LinearCostModel(
        floor_s=0.01, token_s=1e-4, context_token_s=0, attention_pair_s=0, tile=1
    )
    scheduler = make_scheduler(policy=BalancedConfig(), crowding=1.2, cost=cost)
    scheduler.add(make_request("first"))
    scheduler.commit(result_of(scheduler.schedule()))
    first = scheduler.schedule()
    scheduler.add(make_request("second"))
    prompt = scheduler.schedule()
    scheduler.commit(result_of(first))
    first = scheduler.schedule()
    scheduler.commit(result_of(prompt))
    assert scheduler.schedule() is None
    scheduler.commit(result_of(first))
    assert len(scheduler.schedule().sequences) == 2


def test_abort_of_a_sequence_in_flight_applies_at_its_commit():
    scheduler = make_scheduler()
    scheduler.add(make_request())
    batch = scheduler.schedule()
    assert scheduler.abort("a") == []
    assert scheduler.kv_utilization > 0
    (event,) = scheduler.commit(result_of(batch))
    assert (event.finish_reason, event.token_id) == (FinishReason.ABORT, None)
    assert scheduler.is_idle
    assert scheduler.kv_utilization == 0


def test_abort_of_a_waiting_request_ends_it_at_once():
    scheduler = make_scheduler()
    scheduler.add(make_request())
    (event,) = scheduler.abort("a")
    assert event.finish_reason is FinishReason.ABORT
    assert scheduler.abort("a") == []
    assert scheduler.schedule() is None


@pytest.mark.parametrize("is_in_flight", [True, False])
@pytest.mark.parametrize("is_complete", [True, False])
def test_the_predictor_learns_once_from_an_abort_of_an_output_that_is_complete(
    is_complete, is_in_flight
):
    predictor = StatisticsPredictor()
    scheduler = make_scheduler(predictor=predictor)
    num_requests = 32  # so many make a prediction
    for _ in range(num_requests):
        assert predictor.predict(make_request(max_tokens=9)) is None
        scheduler.add(make_request(max_tokens=9))
        for _ in range(3):
            scheduler.commit(result_of(scheduler.schedule()))
        batch = scheduler.schedule() if is_in_flight else None
        for _ in range(2):
            scheduler.abort("a", 2 if is_complete else None)
        if batch is not None:
            scheduler.commit(result_of(batch))
        assert scheduler.is_idle
    assert predictor.predict(make_request(max_tokens=9)) == (2 if is_complete else None)


def test_the_youngest_is_preempted_and_returns_to_the_front():
    scheduler = make_scheduler(num_stages=1, num_blocks=8, max_model_len=32)
    for name in "abc":
        scheduler.add(make_request(name, num_prompt_tokens=7, max_tokens=16))
    outputs = {name: [] for name in "abc"}
    while not scheduler.is_idle:
        for event in scheduler.commit(result_of(scheduler.schedule())):
            outputs[event.request_id].append(event.token_id)
        if scheduler.load().num_preemptions == 1:
            assert [s.request.request_id for s in scheduler._pool.waiting][:1] == ["c"]
    assert scheduler.load().num_preemptions > 0
    assert {name: len(tokens) for name, tokens in outputs.items()} == dict.fromkeys("abc", 16)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (make_request(num_prompt_tokens=0), ["empty"]),
        (make_request(max_tokens=0), ["max_tokens", "0", "at least 1"]),
        (make_request(num_prompt_tokens=120, max_tokens=9), ["120", "9", "129", "128"]),
    ],
)
def test_a_request_that_can_never_fit_is_refused_with_the_numbers(request_, words):
    scheduler = make_scheduler()
    with pytest.raises(InvalidRequestError) as error:
        scheduler.add(request_)
    assert all(word in str(error.value) for word in words)
    assert scheduler.is_idle


def test_a_prompt_larger_than_the_cache_is_refused():
    scheduler = make_scheduler(num_blocks=4, block_size=4, max_model_len=1000)
    scheduler.add(make_request("fits", num_prompt_tokens=10, max_tokens=7))
    with pytest.raises(InvalidRequestError, match="17"):
        scheduler.add(make_request("not", num_prompt_tokens=11, max_tokens=7))


def test_a_request_id_in_use_is_refused():
    scheduler = make_scheduler()
    scheduler.add(make_request())
    with pytest.raises(InvalidRequestError, match="in use"):
        scheduler.add(make_request())


@pytest.mark.parametrize(
    "wrong",
    [
        MicroBatchResult(batch_id=1, token_ids=(5,)),
        MicroBatchResult(batch_id=0, token_ids=()),
        MicroBatchResult(batch_id=0, token_ids=(5, 6)),
    ],
)
def test_a_result_that_does_not_answer_the_oldest_micro_batch_is_an_error(wrong):
    scheduler = make_scheduler()
    scheduler.add(make_request())
    batch = scheduler.schedule()
    with pytest.raises(PipelineError):
        scheduler.commit(wrong)
    assert scheduler.commit(result_of(batch))


def test_of_two_priorities_the_lower_number_is_admitted_first_and_preempted_last():
    policy = TokenThrottlingConfig(kv_threshold=0.0)
    scheduler = make_scheduler(num_stages=1, num_blocks=4, max_model_len=16, policy=policy)
    scheduler.add(make_request("later", num_prompt_tokens=7, max_tokens=8, priority=1))
    scheduler.add(make_request("sooner", num_prompt_tokens=7, max_tokens=8, priority=0))
    batch = scheduler.schedule()
    assert [item.seq_id for item in batch.sequences] == [1, 0]
    while not scheduler.load().num_preemptions:
        scheduler.commit(result_of(batch))
        batch = scheduler.schedule()
    assert [s.request.request_id for s in scheduler._pool.waiting] == ["later"]


def test_a_low_priority_request_finishes_under_an_endless_flow_of_high_ones():
    scheduler = make_scheduler(num_stages=2, num_blocks=12, max_model_len=32)
    ended: list[str] = []
    for index in range(500):
        if index == 20:
            scheduler.add(make_request("low", num_prompt_tokens=12, max_tokens=12, priority=1))
        if scheduler.num_waiting_requests < 10:
            scheduler.add(make_request(str(index), num_prompt_tokens=12, max_tokens=12))
        while scheduler.schedule() is not None:
            pass
        events = scheduler.commit(result_of(scheduler._flights._flights[0].batch))
        ended += [event.request_id for event in events if event.finish_reason]
    assert "low" in ended
    assert ended.index("low") > 5
    assert len(ended) > 30


def test_stage_times_teach_the_cost_model_the_time_of_the_slowest_stage():
    learnt = []

    class Listener(LinearCostModel):
        def observe(self, load, time_s):
            learnt.append((load, time_s))

    free = LinearCostModel(floor_s=0, token_s=1, context_token_s=0, attention_pair_s=0, tile=1)
    scheduler = make_scheduler(num_stages=2, cost=Listener(**asdict(free)))
    scheduler.add(make_request(num_prompt_tokens=6))
    result = result_of(scheduler.schedule())
    scheduler.commit(replace(result, stage_times=(StageTime(0, 0, 0.2),)))
    assert learnt == []
    result = result_of(scheduler.schedule())
    times = (StageTime(1, 0, 0.3), StageTime(0, 1, 0.1), StageTime(1, 1, 0.05))
    scheduler.commit(replace(result, stage_times=times))
    assert learnt == [(StepLoad(0, 0, 6, 36), 0.3), (StepLoad(1, 7, 0, 0), 0.1)]
    # What it takes to score a prompt, no load tells.
    scheduler.add(make_request("scored", num_prompt_tokens=6, num_prompt_logprobs=0))
    batch = scheduler.schedule()
    assert batch.scored_chunks
    times = tuple(StageTime(stage_id, batch.batch_id, 9.0) for stage_id in (0, 1))
    scheduler.commit(replace(result_of(batch), stage_times=times))
    assert len(learnt) == 2


def test_predictions_are_learnt_from_requests_that_ended_by_themselves():
    predictor = StatisticsPredictor()
    scheduler = make_scheduler(predictor=predictor)
    for index in range(40):
        scheduler.add(make_request(f"aborted {index}", max_tokens=100))
        scheduler.abort(f"aborted {index}")
    assert predictor.predict(make_request(max_tokens=100)) is None
    for index in range(40):
        scheduler.add(make_request(str(index), max_tokens=100, stop_token_ids=frozenset({7})))
        batch = scheduler.schedule()
        scheduler.commit(MicroBatchResult(batch_id=batch.batch_id, token_ids=(7,)))
    assert predictor.predict(make_request(max_tokens=100)) == 1


def test_a_short_prompt_is_computed_between_the_chunks_of_a_long_one():
    policy = BalancedConfig(token_budget=32, overtaking=8)
    scheduler = make_scheduler(num_stages=1, num_blocks=64, policy=policy)
    scheduler.add(make_request("long", num_prompt_tokens=96))
    first = scheduler.schedule()
    scheduler.add(make_request("short", num_prompt_tokens=8))
    scheduler.commit(result_of(first))
    second = scheduler.schedule()
    assert [scheduler.request_of(s.seq_id).request_id for s in second.sequences] == [
        "short",
        "long",
    ]
    assert second.sequences[1].start == first.sequences[0].end


def test_a_prompt_of_lower_priority_number_is_computed_between_the_chunks_of_another():
    scheduler = make_scheduler(
        num_stages=1, num_blocks=64, policy=ChunkedPrefillConfig(token_budget=16)
    )
    scheduler.add(make_request("first", num_prompt_tokens=64))
    scheduler.commit(result_of(scheduler.schedule()))
    scheduler.add(make_request("urgent", num_prompt_tokens=16, priority=-1))
    batch = scheduler.schedule()
    assert [scheduler.request_of(s.seq_id).request_id for s in batch.sequences] == ["urgent"]


def test_a_policy_sees_what_is_in_flight_and_which_blocks_hold_nothing_yet():
    policy = ChunkedPrefillConfig(token_budget=8)
    scheduler = make_scheduler(num_blocks=16, block_size=4, num_stages=4, policy=policy)
    assert scheduler._view(0.0).prefill_start == 0
    scheduler.add(make_request("a", num_prompt_tokens=8))
    scheduler.commit(result_of(scheduler.schedule()))
    scheduler.add(make_request("b", num_prompt_tokens=24))
    assert scheduler.schedule().num_tokens == 8
    view = scheduler._view(0.0)
    assert (view.num_tokens_in_flight, view.num_prefills_in_flight) == (8, 1)
    assert (view.num_decoding, view.num_ready) == (1, 0)
    assert (view.prefill_start, view.num_waiting_tokens) == (7, 17)
    assert (view.num_free_blocks, view.kv_free_ratio) == (7, (7 + 17 // 4) / 16)


def test_an_output_is_expected_to_end_as_predicted_and_at_its_limit_once_it_is_longer():
    sequence = Sequence(0, make_request(num_prompt_tokens=8, max_tokens=10))
    sequence.predicted_output_tokens = 3
    expected = []
    for token_id in range(5):
        expected.append(sequence.num_expected_tokens)
        sequence.token_ids.append(token_id)
    assert expected == [3, 2, 1, 7, 6]


@pytest.mark.parametrize(("last", "kept"), [(0, [5, 0]), (~0, [5])], ids=["known", "in flight"])
def test_who_starts_over_forgets_a_token_that_is_not_known_and_no_other(last, kept):
    sequence = Sequence(0, make_request(prompt=[5]))
    sequence.token_ids.append(last)
    sequence.restart()
    assert sequence.token_ids == kept
