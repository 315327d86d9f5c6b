"""What a request finds of the KV that others left, with blocks of four tokens."""

from functools import partial

import pytest

from gllm_ray.messages import OpenRequest
from gllm_ray.policy_config import TokenThrottlingConfig
from gllm_ray.scheduling.block_allocator import BlockAllocator
from gllm_ray.scheduling.prefix_cache import PrefixCache
from gllm_ray.scheduling.sequence import Sequence
from tests import factories
from tests.factories import make_request, result_of

make_scheduler = partial(factories.make_scheduler, prefix_caching=True)

FOURS = TokenThrottlingConfig(max_prefill_tokens=4, min_prefill_tokens=4, kv_threshold=0.0)


def run_to_the_end(scheduler):
    events = []
    while not scheduler.is_idle:
        events += scheduler.commit(result_of(scheduler.schedule()))
    return events


def commit_next(scheduler):
    batch = scheduler.schedule()
    scheduler.commit(result_of(batch))
    return batch


def first_step(scheduler, request):
    """The request's first share of a micro-batch and its copies, after it ran to its end alone."""
    scheduler.add(request)
    batch = commit_next(scheduler)
    (item,) = batch.sequences
    run_to_the_end(scheduler)
    return item, batch.block_copies


def first_item(scheduler, request):
    return first_step(scheduler, request)[0]


@pytest.mark.parametrize("num_prompt_tokens", [2, 3, 4, 5, 8, 9, 11])
def test_a_full_hit_computes_the_last_token_in_a_copy_of_the_last_block(num_prompt_tokens):
    scheduler = make_scheduler()
    first, _ = first_step(scheduler, make_request(num_prompt_tokens=num_prompt_tokens))
    second, copies = first_step(scheduler, make_request(num_prompt_tokens=num_prompt_tokens))
    assert first.num_scheduled_tokens == num_prompt_tokens
    assert (second.start, second.end) == (num_prompt_tokens - 1, num_prompt_tokens)
    assert second.sampling is not None
    assert second.block_table[:-1] == first.block_table[:-1]
    assert copies == ((first.block_table[-1], second.block_table[-1]),)
    assert second.block_table[-1] not in first.block_table


def test_a_last_block_is_copied_while_its_first_owner_writes_on():
    scheduler = make_scheduler(num_stages=1)
    scheduler.add(make_request("a", num_prompt_tokens=6))
    (first,) = commit_next(scheduler).sequences
    scheduler.add(make_request("b", num_prompt_tokens=6))
    batch = commit_next(scheduler)
    decode, second = batch.sequences
    assert (decode.start, second.start) == (6, 5)
    assert batch.block_copies == ((first.block_table[1], second.block_table[1]),)


def test_equal_prompts_of_one_micro_batch_compute_it_once():
    scheduler = make_scheduler(num_stages=1)
    for request_id in "abc":
        scheduler.add(make_request(request_id, num_prompt_tokens=6))
    batch = scheduler.schedule()
    assert [item.num_scheduled_tokens for item in batch.sequences] == [6, 1, 1]
    source = batch.sequences[0].block_table[1]
    targets = [item.block_table[1] for item in batch.sequences[1:]]
    assert batch.block_copies == tuple((source, target) for target in targets)
    assert len({source, *targets}) == 3


def test_a_longer_prompt_does_not_go_on_in_the_last_block_of_a_shorter_one():
    scheduler = make_scheduler()
    first_step(scheduler, make_request(num_prompt_tokens=6))
    item, copies = first_step(scheduler, make_request(num_prompt_tokens=7))
    assert (item.start, copies) == (4, ())


def test_a_block_to_copy_is_not_given_away_in_the_same_micro_batch():
    policy = TokenThrottlingConfig(kv_threshold=0.0)
    scheduler = make_scheduler(num_stages=1, num_blocks=4, max_model_len=16, policy=policy)
    first, _ = first_step(scheduler, make_request(prompt=[5] * 6, max_tokens=1))
    scheduler.add(make_request("b", prompt=[5] * 6, max_tokens=1))
    scheduler.add(make_request("c", prompt=[6] * 4, max_tokens=1))
    scheduler.add(make_request("d", prompt=[7] * 4, max_tokens=1))
    batch = scheduler.schedule()  # one block is left beside the three that b shares and copies
    assert [item.seq_id for item in batch.sequences] == [1, 2]
    ((source, target),) = batch.block_copies
    assert source == first.block_table[1]
    assert {source, target}.isdisjoint(batch.sequences[1].block_table)


def test_a_hit_ends_where_the_prompts_part():
    scheduler = make_scheduler()
    first_item(scheduler, make_request(prompt=[1, 2, 3, 4, 5, 6, 7, 8, 9]))
    item = first_item(scheduler, make_request(prompt=[1, 2, 3, 4, 5, 6, 0, 8, 9]))
    assert item.start == 4


def test_a_block_after_another_prefix_is_another_block():
    scheduler = make_scheduler()
    first_item(scheduler, make_request(prompt=[1, 2, 3, 4, 5, 6, 7, 8, 9]))
    item = first_item(scheduler, make_request(prompt=[0, 2, 3, 4, 5, 6, 7, 8, 9]))
    assert item.start == 0
    item = first_item(scheduler, make_request(prompt=[5, 6, 7, 8, 9]))
    assert item.start == 0


def test_requests_of_different_salts_share_nothing():
    scheduler = make_scheduler()
    starts = [
        first_item(scheduler, make_request(num_prompt_tokens=9, cache_salt=salt)).start
        for salt in ["a", "b", "", "a", "b", ""]
    ]
    assert starts == [0, 0, 0, 8, 8, 8]


def test_a_block_hash_is_the_same_in_every_process_and_on_every_machine():
    cache = PrefixCache(BlockAllocator(num_blocks=4, block_size=4), is_enabled=True)
    sequence = Sequence(0, make_request(prompt=[1, 2, 3, 4, 5, 6, 70_000, 8], cache_salt="ten"))
    expected = "665ca47dc9c7d0686d6642b729adc39a6d5e0fe2ce5a96dc708a9c5043b193c9"
    assert cache._hash(sequence, 1).hex() == expected


def test_a_prefix_is_shared_while_its_writer_is_in_flight():
    scheduler = make_scheduler(num_stages=3)
    scheduler.add(make_request("a", num_prompt_tokens=9))
    writer = scheduler.schedule()
    scheduler.add(make_request("b", num_prompt_tokens=9))
    reader = scheduler.schedule()
    assert reader.sequences[0].start == 8
    assert reader.sequences[0].block_table[:2] == writer.sequences[0].block_table[:2]


def test_a_block_is_not_shared_before_its_last_token_is_scheduled():
    scheduler = make_scheduler(
        num_stages=3,
        policy=TokenThrottlingConfig(
            max_prefill_tokens=6, min_prefill_tokens=6, prefill_iterations=1
        ),
    )
    scheduler.add(make_request("a", num_prompt_tokens=16))
    first = scheduler.schedule()
    assert first.sequences[0].end == 6
    scheduler.abort("a")  # the other ten tokens are never computed
    scheduler.add(make_request("b", num_prompt_tokens=16))
    assert scheduler.schedule().sequences[0].start == 4


def test_output_is_found_by_the_next_turn_of_a_conversation():
    scheduler = make_scheduler(num_stages=1)
    scheduler.add(make_request("a", num_prompt_tokens=6, max_tokens=8))
    output = [event.token_id for event in run_to_the_end(scheduler)]
    item = first_item(scheduler, make_request("b", prompt=[*range(1, 7), *output, 77, 78]))
    # The last output token was never computed, so the block it would fill is not there.
    assert item.start == 12


def test_a_preempted_sequence_finds_its_own_blocks_again():
    scheduler = make_scheduler(num_stages=1, num_blocks=8, max_model_len=32, policy=FOURS)
    scheduler.add(make_request("a", prompt=range(10, 18), max_tokens=9))
    scheduler.add(make_request("b", prompt=range(20, 36), max_tokens=9))
    items = []
    while not scheduler.is_idle:
        items += commit_next(scheduler).sequences
    assert scheduler.load().num_preemptions == 1
    back = next(item for item in items if item.epoch == 1)
    before = [item for item in items if item.seq_id == back.seq_id and item.epoch == 0]
    assert back.start > 0
    num_shared = back.start // 4
    assert back.block_table[:num_shared] == before[-1].block_table[:num_shared]


def test_under_pressure_the_prefix_in_use_stays_and_the_oldest_goes():
    scheduler = make_scheduler(num_stages=1, num_blocks=8, max_model_len=24)
    prompts = {name: [start] * 9 for name, start in zip("abc", (10, 20, 30), strict=True)}
    starts = [
        first_item(scheduler, make_request(name, prompt=prompts[name], max_tokens=1)).start
        for name in "abacab"
    ]
    # a and b leave three cached blocks each; c finds two free ones and takes b's last one; the
    # copy that a then needs takes the one before.
    assert starts == [0, 0, 8, 0, 8, 4]


def test_a_failure_voids_what_was_cached():
    scheduler = make_scheduler()
    first_item(scheduler, make_request(num_prompt_tokens=9))
    scheduler.fail_all("stage 0 is gone")
    assert first_item(scheduler, make_request(num_prompt_tokens=9)).start == 0


def test_cached_blocks_leave_the_whole_cache_to_one_large_prompt():
    scheduler = make_scheduler(num_stages=1, num_blocks=8, max_model_len=32)
    first_item(scheduler, make_request(prompt=[5] * 16))
    assert scheduler.kv_utilization == 0
    item = first_item(scheduler, make_request(prompt=[6] * 28))
    assert (item.start, len(item.block_table)) == (0, 7)


def test_a_hit_needs_its_unreferenced_blocks_beside_the_new_ones():
    scheduler = make_scheduler(num_stages=2, num_blocks=6, max_model_len=24, policy=FOURS)
    first_item(scheduler, make_request("a", prompt=[5] * 9, max_tokens=1))  # two are cached
    scheduler.add(make_request("b", prompt=[6] * 9, max_tokens=1))
    running = scheduler.schedule()  # takes three: three are left, two of them cached
    assert running.sequences[0].start == 0
    scheduler.add(make_request("c", prompt=[5] * 16, max_tokens=1))  # two found, two new
    assert {item.seq_id for item in scheduler.schedule().sequences} == {1}
    assert scheduler.schedule() is None


def test_counters_tell_queried_and_found_tokens():
    scheduler = make_scheduler()
    for num_prompt_tokens in (9, 12, 12):
        first_item(scheduler, make_request(num_prompt_tokens=num_prompt_tokens))
    assert scheduler.load().num_prefix_queried_tokens == 33
    assert scheduler.load().num_prefix_hit_tokens == 0 + 8 + 11


def test_a_request_that_waits_for_blocks_is_counted_once():
    scheduler = make_scheduler(num_stages=2, num_blocks=4, max_model_len=16)
    scheduler.add(make_request("a", prompt=[5] * 9))
    scheduler.add(make_request("b", prompt=[6] * 9))
    batch = scheduler.schedule()
    assert scheduler.schedule() is None
    assert scheduler.schedule() is None
    assert scheduler.load().num_prefix_queried_tokens == 9
    scheduler.commit(result_of(batch))
    run_to_the_end(scheduler)
    assert scheduler.load().num_prefix_queried_tokens == 18


@pytest.mark.parametrize(
    ("num_prompt_tokens", "max_tokens", "told"),
    [(11, 3, 10), (12, 3, 11), (13, 3, 12), (7, 3, 4), (11, 1, 10)],
)
def test_the_first_token_tells_what_was_found_of_the_prompt_and_no_other_does(
    num_prompt_tokens, max_tokens, told
):
    scheduler = make_scheduler()
    for known in (11, 12):
        scheduler.add(make_request(num_prompt_tokens=known, max_tokens=1))
        run_to_the_end(scheduler)
    prompt = [*range(1, min(num_prompt_tokens, 12) + 1), *[99] * (num_prompt_tokens - 12)]
    scheduler.add(make_request(prompt=prompt, max_tokens=max_tokens))
    events = run_to_the_end(scheduler)
    found = [event.num_cached_tokens for event in events]
    assert found == [told] + [None] * (max_tokens - 1)


@pytest.mark.parametrize(("output", "told"), [((), [8, None]), ((101,), [None, None])])
def test_a_request_of_another_scheduler_tells_what_is_found_unless_its_first_token_is_out(
    output, told
):
    scheduler = make_scheduler()
    first_item(scheduler, make_request(prompt=[*range(1, 10), 101, 5, 5]))
    request = make_request(num_prompt_tokens=9, max_tokens=len(output) + 2)
    scheduler.restore(OpenRequest(request=request, output_token_ids=output))
    events = run_to_the_end(scheduler)
    assert [event.num_cached_tokens for event in events] == told


def test_without_prefix_caching_nothing_is_found_or_counted():
    scheduler = make_scheduler(prefix_caching=False)
    starts = [first_item(scheduler, make_request(num_prompt_tokens=9)).start for _ in range(2)]
    assert starts == [0, 0]
    scheduler.add(make_request())
    assert run_to_the_end(scheduler)[0].num_cached_tokens == 0
    assert scheduler.load().num_prefix_queried_tokens == scheduler.load().num_prefix_hit_tokens == 0


def test_a_prompt_without_room_comes_in_when_another_has_computed_enough_of_its_prefix():
    scheduler = make_scheduler(num_blocks=20, num_stages=1, policy=FOURS)
    scheduler.add(make_request("first", num_prompt_tokens=64))
    commit_next(scheduler)
    scheduler.add(make_request("urgent", num_prompt_tokens=64, priority=-1))
    for _ in range(11):  # it lacks more than the 4 blocks that are free until these are computed
        assert [item.seq_id for item in commit_next(scheduler).sequences] == [0]
    (item,) = commit_next(scheduler).sequences
    assert (item.seq_id, item.start, item.block_table[:12]) == (1, 48, tuple(range(12)))
