import pytest

from gllm_ray.errors import InvalidRequestError, PipelineError
from gllm_ray.messages import FinishReason, MicroBatchResult
from gllm_ray.policy_config import TokenThrottlingConfig
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
    while scheduler.num_waiting_tokens:
        scheduler.commit(result_of(scheduler.schedule()))
    batches = [scheduler.schedule() for _ in range(4)]
    assert [len(b.sequences) for b in batches] == [2, 2, 2, 2]


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


def test_the_youngest_is_preempted_and_returns_to_the_front():
    scheduler = make_scheduler(num_stages=1, num_blocks=8, max_model_len=32)
    for name in "abc":
        scheduler.add(make_request(name, num_prompt_tokens=7, max_tokens=16))
    outputs = {name: [] for name in "abc"}
    while not scheduler.is_idle:
        for event in scheduler.commit(result_of(scheduler.schedule())):
            outputs[event.request_id].append(event.token_id)
        if scheduler.num_preemptions == 1:
            assert [s.request.request_id for s in scheduler._pool.waiting][:1] == ["c"]
    assert scheduler.num_preemptions > 0
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
