"""The ring: the oldest micro-batch in flight counts as committed while the pipeline is full."""

from gllm_ray.messages import FinishReason, MicroBatchResult
from gllm_ray.policy_config import TokenThrottlingConfig
from gllm_ray.scheduling.sequence import Sequence
from tests.factories import make_request, make_scheduler, result_of

EOS = 7
TOKEN = 9


def make_ring(**options):
    policy = TokenThrottlingConfig(kv_threshold=0.0)
    return make_scheduler(num_stages=1, policy=policy, ring=True, **options)


def answer(batch, *token_ids):
    return MicroBatchResult(batch_id=batch.batch_id, token_ids=token_ids)


def test_a_full_pipeline_takes_one_more_that_refers_to_the_tokens_of_the_oldest():
    scheduler = make_ring()
    for name in "ab":
        scheduler.add(make_request(name, num_prompt_tokens=8))
    prompts, decodes = scheduler.schedule(), scheduler.schedule()
    assert scheduler.schedule() is None
    assert (prompts.continues, decodes.continues) == (None, prompts.batch_id)
    assert [item.token_ids for item in decodes.sequences] == [(~0,), (~1,)]
    assert [(item.start, item.end) for item in decodes.sequences] == [(8, 9), (8, 9)]


def test_a_pipeline_that_is_not_full_waits_for_the_tokens():
    scheduler = make_scheduler(num_stages=2, ring=True)
    scheduler.add(make_request())
    batch = scheduler.schedule()
    assert scheduler.schedule() is None
    scheduler.commit(answer(batch, TOKEN))
    assert scheduler.schedule().sequences[0].token_ids == (TOKEN,)


def test_what_is_scheduled_after_its_token_has_come_holds_the_token():
    scheduler = make_ring(max_decodes=1)
    for name in "ab":
        scheduler.add(make_request(name))
    scheduler.schedule()
    first = scheduler.schedule()  # only one of the two
    assert [item.token_ids for item in first.sequences] == [(~0,)]
    scheduler.commit(MicroBatchResult(batch_id=0, token_ids=(3, 4)))
    second = scheduler.schedule()
    assert [item.token_ids for item in second.sequences] == [(4,)]
    assert second.continues is None


def test_a_stop_token_ends_the_request_at_once_and_its_blocks_come_back_after_one_decode_in_vain():
    scheduler = make_ring()
    scheduler.add(make_request(stop_token_ids=frozenset({EOS})))
    prompt, in_vain = scheduler.schedule(), scheduler.schedule()
    (event,) = scheduler.commit(answer(prompt, EOS))
    assert (event.finish_reason, event.token_id) == (FinishReason.STOP, EOS)
    assert scheduler.num_requests == 0
    assert scheduler.kv_utilization > 0
    scheduler.add(make_request())  # the id is free again
    assert scheduler.commit(answer(in_vain, TOKEN)) == []
    (event,) = scheduler.abort("a")
    assert scheduler.is_idle
    assert scheduler.kv_utilization == 0


def test_the_last_token_that_a_request_may_have_is_never_decoded_further():
    scheduler = make_ring()
    scheduler.add(make_request(max_tokens=2))
    batches = [scheduler.schedule(), scheduler.schedule()]
    assert scheduler.commit(answer(batches[0], TOKEN))[0].finish_reason is None
    assert scheduler.schedule() is None
    (event,) = scheduler.commit(answer(batches[1], TOKEN))
    assert event.finish_reason is FinishReason.LENGTH
    assert scheduler.is_idle


def test_an_abort_ends_a_sequence_at_the_commit_of_its_second_micro_batch():
    scheduler = make_ring()
    scheduler.add(make_request())
    batches = [scheduler.schedule(), scheduler.schedule()]
    assert scheduler.abort("a") == []
    assert scheduler.commit(answer(batches[0], TOKEN)) == []
    (event,) = scheduler.commit(answer(batches[1], TOKEN))
    assert event.finish_reason is FinishReason.ABORT
    assert scheduler.is_idle


def test_a_failure_ends_no_request_a_second_time():
    scheduler = make_ring()
    for name in "ab":
        scheduler.add(make_request(name, stop_token_ids=frozenset({EOS})))
    prompts = scheduler.schedule()
    scheduler.schedule()
    ended, _ = scheduler.commit(answer(prompts, EOS, TOKEN))
    (event,) = scheduler.fail_all("gone")
    assert (ended.request_id, event.request_id) == ("a", "b")
    assert scheduler.is_idle
    assert scheduler.kv_utilization == 0


def test_a_block_is_shared_only_once_its_last_token_is_known():
    scheduler = make_ring(block_size=4, prefix_caching=True, max_decodes=1)
    scheduler.add(make_request("first", prompt=(1, 2, 3), max_tokens=9))
    prompt = scheduler.schedule()
    filling = scheduler.schedule()  # position 3, the last of the block
    assert filling.sequences[0].end == 4
    follow_up = Sequence(1, make_request(prompt=(1, 2, 3, TOKEN, 5)))
    find = scheduler._pool.prefix_cache.find
    assert find(follow_up).blocks == ()
    scheduler.commit(answer(prompt, TOKEN))
    assert find(follow_up).blocks == filling.sequences[0].block_table


def test_nothing_is_preempted_for_a_token_that_is_not_known_or_while_it_is_not():
    scheduler = make_ring(num_blocks=4, max_model_len=16)
    for name in "ab":
        scheduler.add(make_request(name, num_prompt_tokens=8, max_tokens=8))
    prompts = scheduler.schedule()
    assert scheduler.schedule() is None  # each misses a block, and both are in flight
    assert scheduler.load().num_preemptions == 0
    scheduler.commit(result_of(prompts))
    assert len(scheduler.schedule().sequences) == 1
    assert scheduler.load().num_preemptions == 1


def test_a_sequence_that_begins_again_forgets_a_token_that_is_not_known():
    sequence = Sequence(0, make_request(prompt=(1, 2)))
    sequence.token_ids += [TOKEN, ~0]
    sequence.restart()
    assert sequence.token_ids == [1, 2, TOKEN]
    sequence.restart()
    assert sequence.token_ids == [1, 2, TOKEN]
