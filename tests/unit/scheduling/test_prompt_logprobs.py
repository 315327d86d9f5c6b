"""Which chunks are scored, and when what is found of them is told."""

from functools import partial

from gllm_ray.messages import OpenRequest
from gllm_ray.policy_config import TokenThrottlingConfig
from tests import factories
from tests.factories import make_request, result_of, told_of

FOURS = TokenThrottlingConfig(max_prefill_tokens=4, min_prefill_tokens=4, kv_threshold=0.0)
make_scheduler = partial(factories.make_scheduler, num_stages=1, policy=FOURS, prefix_caching=True)


def run_to_the_end(scheduler):
    """The chunks that were scored, and the events."""
    chunks, events = [], []
    while not scheduler.is_idle:
        batch = scheduler.schedule()
        chunks += batch.scored_chunks
        events += scheduler.commit(result_of(batch))
    return chunks, events


def test_each_chunk_knows_the_token_behind_it_and_the_first_token_comes_with_all():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", num_prompt_tokens=10, num_prompt_logprobs=3))
    chunks, events = run_to_the_end(scheduler)
    assert chunks == [(0, 3, 5), (0, 3, 9), (0, 3, None)]
    assert [event.prompt_logprobs for event in events] == [told_of(range(2, 11), 3), *[None] * 3]


def test_a_prompt_of_one_token_has_nothing_to_tell_and_says_so():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", num_prompt_tokens=1, num_prompt_logprobs=3))
    _, events = run_to_the_end(scheduler)
    assert [event.prompt_logprobs for event in events] == [b"", *[None] * 3]


def test_a_request_that_does_not_ask_is_neither_scored_nor_told():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", num_prompt_tokens=10))
    chunks, events = run_to_the_end(scheduler)
    assert chunks == []
    assert all(event.prompt_logprobs is None for event in events)


def test_what_goes_on_from_some_output_is_scored_no_more_and_reads_the_cache():
    scheduler = make_scheduler()
    request = make_request("a", num_prompt_tokens=10, num_prompt_logprobs=0)
    scheduler.add(request)
    run_to_the_end(scheduler)
    scheduler.restore(OpenRequest(request=request, output_token_ids=(100,)))
    batch = scheduler.schedule()
    assert (batch.scored_chunks, batch.sequences[0].start) == ((), 8)
    events = scheduler.commit(result_of(batch)) + run_to_the_end(scheduler)[1]
    assert all(event.prompt_logprobs is None for event in events)


def test_what_goes_on_from_no_output_is_scored_all_over_again():
    scheduler = make_scheduler()
    request = make_request("a", num_prompt_tokens=10, num_prompt_logprobs=0)
    scheduler.restore(OpenRequest(request=request))
    scheduler.commit(result_of(scheduler.schedule()))
    scheduler.schedule()
    scheduler.requeue_all()
    chunks, events = run_to_the_end(scheduler)
    assert chunks == [(0, 0, 5), (0, 0, 9), (0, 0, None)]
    assert events[0].prompt_logprobs == told_of(range(2, 11), 0)
