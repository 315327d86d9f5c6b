"""Which requests may wait, and when the others should come again."""

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_ray.errors import OverloadedError
from gllm_ray.messages import FinishReason
from gllm_ray.policy_config import ChunkedPrefillConfig, TokenThrottlingConfig
from gllm_ray.scheduling import QueueLimits
from gllm_ray.scheduling.admission import BacklogRate
from tests.factories import make_request, make_scheduler, result_of


def refusal(scheduler, now_s=0.0, **options):
    with pytest.raises(OverloadedError) as caught:
        scheduler.add(make_request("more", **options), now_s)
    return caught.value


def test_one_request_more_than_may_wait_is_refused_with_the_numbers():
    scheduler = make_scheduler(queue=QueueLimits(max_requests=2))
    for request_id in "ab":
        scheduler.add(make_request(request_id))
    error = refusal(scheduler)
    assert "2 requests wait; the limit is 2" in str(error)
    assert scheduler.num_requests == 2


def test_what_runs_does_not_count_as_waiting():
    scheduler = make_scheduler(queue=QueueLimits(max_requests=2))
    for request_id in "ab":
        scheduler.add(make_request(request_id))
    scheduler.schedule()
    scheduler.add(make_request("c"))
    assert scheduler.num_waiting_requests == 1


def test_more_prompt_tokens_than_may_wait_are_refused_unless_nothing_waits():
    scheduler = make_scheduler(queue=QueueLimits(max_tokens=10))
    scheduler.add(make_request("alone", num_prompt_tokens=30))
    assert "30 tokens wait, and the prompt has 1" in str(refusal(scheduler, num_prompt_tokens=1))


def test_prompts_may_wait_up_to_the_limit_of_tokens_together():
    scheduler = make_scheduler(queue=QueueLimits(max_tokens=10))
    scheduler.add(make_request("a", num_prompt_tokens=4))
    assert "4 tokens wait, and the prompt has 7" in str(refusal(scheduler, num_prompt_tokens=7))
    scheduler.add(make_request("b", num_prompt_tokens=6))


@given(st.lists(st.tuples(st.integers(0, 1000), st.floats(0.01, 1)), min_size=1, max_size=10))
def test_a_rate_is_the_mean_of_the_last_ten_seconds_of_backlog(spans):
    rate, now_s = BacklogRate(), 0.0
    for num_tokens, elapsed_s in spans:
        rate.note(num_tokens, now_s, is_backlogged=True)
        now_s += elapsed_s
    rate.note(50, now_s, is_backlogged=True)
    assert rate.tokens_per_s == pytest.approx(sum(num_tokens for num_tokens, _ in spans) / now_s)
    rate.note(60, now_s + 10, is_backlogged=True)
    assert rate.tokens_per_s == pytest.approx(5)
    rate.note(0, now_s + 40, is_backlogged=True)
    assert rate.tokens_per_s == pytest.approx(2)


def test_a_refused_request_may_come_again_under_its_id():
    scheduler = make_scheduler(queue=QueueLimits(max_requests=1))
    scheduler.add(make_request("a"))
    refusal(scheduler)
    scheduler.schedule()
    scheduler.add(make_request("more"))
    assert scheduler.num_requests == 2


def test_retry_after_is_the_time_the_backlog_takes_at_the_recent_rate():
    scheduler = make_scheduler(num_stages=1, num_blocks=16, queue=QueueLimits(max_requests=40))
    for index in range(40):
        scheduler.add(make_request(str(index), num_prompt_tokens=30, max_tokens=1))
    assert refusal(scheduler).retry_after_s == 1.0  # nothing is known yet
    now_s = 0.0
    for _ in range(20):
        batch = scheduler.schedule(now_s)
        now_s += batch.num_tokens / 20  # twenty tokens a second
        scheduler.commit(result_of(batch), now_s)
    for index in range(40, 40 + 40 - scheduler.num_waiting_requests):
        scheduler.add(make_request(str(index), num_prompt_tokens=30, max_tokens=1))
    expected_s = scheduler.load().num_waiting_tokens / 20
    assert refusal(scheduler).retry_after_s == pytest.approx(expected_s, rel=0.1)


def test_filling_an_idle_pipeline_is_soon_forgotten():
    scheduler = make_scheduler(num_stages=4, num_blocks=8, queue=QueueLimits(max_requests=100))
    for index in range(100):
        scheduler.add(make_request(str(index), num_prompt_tokens=30, max_tokens=1))
    now_s, batches = 0.0, deque()
    for _ in range(20):
        while (batch := scheduler.schedule(now_s)) is not None:
            batches.append(batch)
            now_s += 0.0001
        batch = batches.popleft()
        now_s += batch.num_tokens / 20
        scheduler.commit(result_of(batch), now_s)
    while scheduler.num_waiting_requests < 100:
        scheduler.add(make_request(f"late {now_s} {scheduler.num_waiting_requests}"), now_s)
    expected_s = scheduler._pool.waiting.num_tokens / 20
    assert refusal(scheduler, now_s).retry_after_s == pytest.approx(expected_s, rel=0.25)


def test_the_rate_is_learnt_from_busy_times_alone():
    scheduler = make_scheduler(num_stages=1, num_blocks=16, queue=QueueLimits(max_requests=4))
    now_s = 0.0
    for index in range(50):
        for part in range(3):  # two fit at once, so that there is a backlog for a moment
            request_id = f"{index}-{part}"
            scheduler.add(make_request(request_id, num_prompt_tokens=30, max_tokens=1), now_s)
        while not scheduler.is_idle:
            batch = scheduler.schedule(now_s)
            now_s += batch.num_tokens / 20
            scheduler.commit(result_of(batch), now_s)
        now_s += 1000
    for index in range(4):
        scheduler.add(make_request(str(index), num_prompt_tokens=30, max_tokens=1), now_s)
    assert refusal(scheduler, now_s).retry_after_s == pytest.approx(120 / 20, rel=0.1)


@pytest.mark.parametrize(("num_blocks", "is_known"), [(64, True), (16, False)])
def test_the_rate_of_prefill_is_learnt_while_prompts_wait_for_nothing_else(num_blocks, is_known):
    policy = TokenThrottlingConfig(max_prefill_tokens=8, min_prefill_tokens=8, kv_threshold=0.0)
    scheduler = make_scheduler(num_stages=1, num_blocks=num_blocks, policy=policy)
    for name in "abcdef":
        scheduler.add(make_request(name, num_prompt_tokens=40, max_tokens=1))
    now_s = 0.0
    while not scheduler.is_idle:
        batch = scheduler.schedule(now_s)
        now_s += batch.num_tokens / 20
        scheduler.commit(result_of(batch), now_s)
    load = scheduler.load()
    assert load.drain_tokens_per_s == pytest.approx(20)
    assert load.prefill_capacity_tokens_per_s == (pytest.approx(20) if is_known else 0)


def test_what_the_prefix_cache_has_does_not_count_in_retry_after():
    scheduler = make_scheduler(
        num_stages=1,
        num_blocks=1000,
        prefix_caching=True,
        policy=ChunkedPrefillConfig(token_budget=40),
        queue=QueueLimits(max_requests=60),
    )
    for index in range(60):
        scheduler.add(make_request(str(index), prompt=[7] * 60 + [index] * 20, max_tokens=1))
    now_s, told_s = 0.0, None
    while scheduler.num_waiting_requests:
        if now_s > 30 and told_s is None:
            while scheduler.num_waiting_requests < 60:
                name = f"late {scheduler.num_requests}"
                prompt = [7] * 60 + [100 + scheduler.num_requests] * 20
                scheduler.add(make_request(name, prompt=prompt, max_tokens=1))
            told_s, asked_s = refusal(scheduler).retry_after_s, now_s
        batch = scheduler.schedule(now_s)
        now_s += batch.num_tokens / 20
        scheduler.commit(result_of(batch), now_s)
    assert told_s == pytest.approx(now_s - asked_s, rel=0.15)


def test_the_time_of_a_repair_is_no_backlog():
    scheduler = make_scheduler(num_stages=1, num_blocks=16, queue=QueueLimits(max_requests=40))
    for index in range(40):
        scheduler.add(make_request(str(index), num_prompt_tokens=30, max_tokens=1))
    now_s = 0.0
    for _ in range(10):
        batch = scheduler.schedule(now_s)
        now_s += batch.num_tokens / 20
        scheduler.commit(result_of(batch), now_s)
    before = scheduler.load().drain_tokens_per_s
    scheduler.schedule(now_s)
    scheduler.requeue_all()
    scheduler.schedule(now_s + 600)
    assert scheduler.load().drain_tokens_per_s == before == pytest.approx(20, rel=0.1)


def test_a_request_ends_at_its_deadline_unless_it_was_admitted():
    scheduler = make_scheduler(num_stages=1, num_blocks=4, queue=QueueLimits(timeout_s=5.0))
    for request_id, timeout_s in [("runs", None), ("waits", None), ("hurries", 1.0)]:
        request = make_request(request_id, num_prompt_tokens=12, queue_timeout_s=timeout_s)
        scheduler.add(request, now_s=10.0)
    batch = scheduler.schedule(10.0)
    assert scheduler.next_deadline_s == 11.0
    (event,) = scheduler.expire(11.0)
    assert (event.request_id, event.finish_reason) == ("hurries", FinishReason.EXPIRED)
    assert event.retry_after_s == 1.0
    assert [e.request_id for e in scheduler.expire(15.0)] == ["waits"]
    assert scheduler.next_deadline_s is None
    assert [e.request_id for e in scheduler.commit(result_of(batch), 16.0)] == ["runs"]


def test_a_request_that_was_preempted_does_not_expire():
    scheduler = make_scheduler(
        num_stages=1,
        num_blocks=4,
        max_model_len=16,
        policy=TokenThrottlingConfig(kv_threshold=0.0),
        queue=QueueLimits(timeout_s=1.0),
    )
    for request_id in "ab":
        scheduler.add(make_request(request_id, num_prompt_tokens=7, max_tokens=8))
    while not scheduler.load().num_preemptions:
        scheduler.commit(result_of(scheduler.schedule()))
    assert scheduler.num_waiting_requests == 1
    assert scheduler.expire(100.0) == []
