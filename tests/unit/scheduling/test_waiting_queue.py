"""Who is admitted next."""

from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gllm_ray.scheduling.sequence import Sequence
from gllm_ray.scheduling.waiting_queue import WaitingQueue
from tests.factories import make_request


def sequence(seq_id, *, num_tokens=8, max_tokens=4, priority=0, tenant=""):
    request = make_request(
        str(seq_id),
        num_prompt_tokens=num_tokens,
        max_tokens=max_tokens,
        priority=priority,
        tenant=tenant,
    )
    return Sequence(seq_id, request)


def queue_of(*sequences, fair_share=False, overtaking=0.0):
    queue = WaitingQueue(fair_share=fair_share, overtaking=overtaking)
    for item in sequences:
        queue.add(item)
    return queue


def pop_all(queue):
    return [queue.pop().seq_id for _ in range(len(queue))]


def preempt(queue, item):
    item.restart()
    queue.add(item)


def test_lower_priority_goes_first_and_arrival_decides_within():
    priorities = [0, 5, -1, 5, 0, -1]
    queue = queue_of(*(sequence(i, priority=p) for i, p in enumerate(priorities)))
    assert [s.seq_id for s in queue] == [2, 5, 0, 4, 1, 3]
    assert pop_all(queue) == [2, 5, 0, 4, 1, 3]


def test_a_preempted_sequence_returns_to_its_place():
    items = [sequence(i, priority=p) for i, p in enumerate([0, 0, 0, -1])]
    queue = queue_of(*items)
    assert [queue.pop(), queue.pop()] == [items[3], items[0]]
    preempt(queue, items[0])
    assert [s.seq_id for s in queue] == [0, 1, 2]


def test_one_admission_in_eight_heeds_no_priority_and_is_not_preempted_later():
    low = sequence(0, priority=9)
    queue = queue_of(low, *(sequence(i) for i in range(1, 20)))
    assert [queue.pop().seq_id for _ in range(9)] == [1, 2, 3, 4, 5, 6, 7, 0, 8]
    preempt(queue, low)
    assert queue.head() is low


def test_a_low_priority_is_admitted_under_an_endless_flow_of_high_ones():
    queue = queue_of(*(sequence(i, priority=1) for i in range(5)))
    admitted = []
    for seq_id in range(5, 100):
        queue.add(sequence(seq_id))
        admitted.append(queue.pop().seq_id)
    assert set(range(5)) <= set(admitted)


def test_in_plain_order_of_arrival_no_rank_is_raised():
    items = [sequence(i) for i in range(20)]
    queue = queue_of(*items)
    assert pop_all(queue) == list(range(20))
    assert [item.rank for item in items] == [(0, 0, i) for i in range(20)]


def test_short_prompts_pass_long_ones_that_came_before():
    queue = queue_of(*(sequence(i, num_tokens=n) for i, n in enumerate([90, 10, 50])), overtaking=2)
    assert pop_all(queue) == [1, 0, 2]


def test_overtaking_heeds_priorities_first():
    long, short = sequence(0, num_tokens=90, priority=-1), sequence(1, num_tokens=1)
    assert pop_all(queue_of(long, short, overtaking=64)) == [0, 1]


def test_of_equal_prompts_none_passes_another():
    queue = queue_of(*(sequence(i) for i in range(20)), overtaking=64)
    assert pop_all(queue) == list(range(20))


@given(st.lists(st.integers(1, 200), min_size=1, max_size=40), st.floats(0, 100))
def test_no_more_tokens_pass_a_prompt_than_overtaking_allows(sizes, overtaking):
    queue = queue_of(
        *(sequence(i, num_tokens=n) for i, n in enumerate(sizes)), overtaking=overtaking
    )
    order = pop_all(queue)
    for place, seq_id in enumerate(order):
        passed_by = [other for other in order[:place] if other > seq_id]
        assert sum(sizes[other] for other in passed_by) <= overtaking * sizes[seq_id]


def test_a_long_prompt_is_admitted_under_an_endless_flow_of_short_ones():
    queue = queue_of(sequence(0, num_tokens=100), overtaking=4)
    for seq_id in range(1, 100):
        queue.add(sequence(seq_id, num_tokens=10))
        if queue.pop().seq_id == 0:
            break
    assert seq_id == 27  # due at 400; those are due 40 after the 100 + 10 a prompt before them


def outputs(*max_tokens, **options):
    return [sequence(i, max_tokens=n, **options) for i, n in enumerate(max_tokens)]


def test_long_outputs_go_first_the_longest_before_the_others():
    queue = queue_of(*outputs(10, 50, 20, 90, 49, 50))
    queue.put_first(50)
    assert pop_all(queue) == [3, 1, 5, 0, 2, 4]


def test_what_counts_as_long_may_change_with_each_admission():
    queue = queue_of(*outputs(10, 50, 20, 90))
    popped = []
    for long_output in (60, 60, inf, 20):
        queue.put_first(long_output)
        popped.append(queue.pop().seq_id)
    assert popped == [3, 0, 1, 2]


def test_of_equally_long_outputs_the_ranks_decide():
    items = [sequence(i, num_tokens=n, max_tokens=60) for i, n in enumerate([90, 10, 50])]
    queue = queue_of(*items, overtaking=2)
    queue.put_first(50)
    assert pop_all(queue) == [1, 0, 2]


def test_a_long_output_that_comes_later_goes_first_too():
    queue = queue_of(*outputs(60, 50, 10))
    queue.put_first(50)
    assert queue.pop().seq_id == 0
    queue.add(sequence(3, max_tokens=70))
    assert pop_all(queue) == [3, 1, 2]


def test_long_outputs_of_higher_priority_numbers_pass_nobody_of_a_lower_one():
    queue = queue_of(*outputs(60, 70, priority=1), sequence(2), sequence(3, max_tokens=50))
    queue.put_first(50)
    assert pop_all(queue) == [3, 2, 1, 0]


def test_where_tenants_take_turns_long_outputs_do_not_go_first():
    items = [sequence(0, tenant="a"), sequence(1, tenant="b", max_tokens=90)]
    queue = queue_of(*items, fair_share=True)
    queue.put_first(50)
    assert pop_all(queue) == [0, 1]


def test_one_admission_in_eight_heeds_no_length():
    queue = queue_of(*outputs(4, *[50] * 20))
    queue.put_first(50)
    assert [queue.pop().seq_id for _ in range(9)] == [1, 2, 3, 4, 5, 6, 7, 0, 8]


@pytest.mark.parametrize("priority", [0, 1])
def test_no_long_output_passes_a_preempted_sequence_whose_turn_it_is(priority):
    preempted = sequence(0, priority=priority)
    queue = queue_of(preempted, *(sequence(i, max_tokens=50) for i in range(1, 21)))
    queue.put_first(50)
    assert [queue.pop().seq_id for _ in range(8)] == [1, 2, 3, 4, 5, 6, 7, 0]
    preempt(queue, preempted)
    assert queue.head() is preempted


def test_a_long_output_that_went_first_goes_first_again_after_a_preemption():
    short, long = outputs(10, 90)
    queue = queue_of(short, long)
    queue.put_first(50)
    assert queue.pop() is long
    queue.put_first(inf)
    preempt(queue, long)
    assert pop_all(queue) == [1, 0]


def test_tenants_take_turns_and_short_prompts_of_each_go_first():
    items = [(0, "a", 40), (1, "a", 4), (2, "b", 40), (3, "b", 4)]
    queue = queue_of(
        *(sequence(i, tenant=tenant, num_tokens=n) for i, tenant, n in items),
        fair_share=True,
        overtaking=2,
    )
    assert pop_all(queue) == [1, 3, 0, 2]


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 30))
def test_tenants_with_a_backlog_get_equal_prefill_tokens(size_a, size_b):
    items = [sequence(i, num_tokens=size_a, tenant="a") for i in range(100)]
    items += [sequence(100 + i, num_tokens=size_b, tenant="b") for i in range(100)]
    queue = queue_of(*items, fair_share=True)
    tokens, left = {"a": 0, "b": 0}, {"a": 100, "b": 100}
    while min(left.values()) > 1:
        item = queue.pop()
        tokens[item.request.tenant] += item.num_tokens
        left[item.request.tenant] -= 1
    assert abs(tokens["a"] - tokens["b"]) <= 2 * max(size_a, size_b)


def test_a_tenant_that_comes_anew_has_saved_up_nothing():
    queue = queue_of(*(sequence(i, tenant="a") for i in range(40)), fair_share=True)
    for _ in range(20):
        queue.pop()
    for seq_id in range(40, 44):
        queue.add(sequence(seq_id, tenant="b"))
    tenants = [queue.pop().request.tenant for _ in range(8)]
    assert 3 <= tenants.count("b") <= 4


def test_ever_new_tenants_do_not_starve_one_with_a_backlog():
    queue = queue_of(*(sequence(i, tenant="a") for i in range(5)), fair_share=True)
    admitted = []
    for seq_id in range(5, 100):
        queue.add(sequence(seq_id, tenant=f"new {seq_id}"))
        admitted.append(queue.pop().seq_id)
    assert set(range(5)) <= set(admitted)


def test_who_leaves_unserved_is_not_charged():
    queue = WaitingQueue(fair_share=True)
    gone = sequence(0, num_tokens=1000, tenant="a")
    queue.add(gone)
    queue.remove(gone)
    queue.add(sequence(1, tenant="b"))
    queue.add(sequence(2, tenant="a"))
    queue.add(sequence(3, tenant="b"))
    assert pop_all(queue) == [1, 2, 3]


def test_who_waits_moves_up_at_once_when_one_of_its_tenant_leaves():
    gone, next_of_a = sequence(0, num_tokens=100, tenant="a"), sequence(1, tenant="a")
    queue = queue_of(gone, next_of_a, sequence(2, tenant="b"), fair_share=True)
    queue.remove(gone)
    assert queue.head() is next_of_a


def test_who_waits_is_not_charged_for_those_of_its_tenant_that_left():
    many = [sequence(i, num_tokens=10, tenant="a") for i in range(100)]
    queue = queue_of(*many, fair_share=True)
    for gone in many[:50] + many[51:99]:
        queue.remove(gone)
    for seq_id in range(100, 120):
        queue.add(sequence(seq_id, num_tokens=10, tenant="b"))
    queue.add(sequence(120, num_tokens=10, tenant="a"))
    assert pop_all(queue)[:6] == [50, 100, 99, 101, 102, 120]


def test_the_counters_of_many_tenants_are_bounded():
    queue = WaitingQueue(fair_share=True)
    for seq_id in range(10_000):
        queue.add(sequence(seq_id, tenant=str(seq_id)))
        queue.pop()
    assert len(queue._counters) <= 8192


def test_a_deadline_ends_the_wait_of_those_never_admitted():
    preempted, early, late = (sequence(i) for i in range(3))
    queue = WaitingQueue()
    queue.add(preempted, deadline_s=1.0)
    queue.add(late, deadline_s=3.0)
    queue.add(early, deadline_s=2.0)
    assert queue.next_deadline_s == 1.0
    assert queue.pop() is preempted
    preempt(queue, preempted)
    assert list(queue.take_expired(2.0)) == [early]
    assert queue.next_deadline_s == 3.0
    assert set(queue) == {preempted, late}
    assert queue.num_tokens == 16


@given(st.lists(st.one_of(st.integers(-2, 2), st.sampled_from(["pop", "remove"])), max_size=300))
def test_counts_and_order_follow_the_members(todo):
    queue, waiting = WaitingQueue(), []
    for index, action in enumerate(todo):
        if action == "pop" and waiting:
            waiting.remove(queue.pop())
        elif action == "remove" and waiting:
            queue.remove(waiting.pop(len(waiting) // 2))
        elif isinstance(action, int):
            waiting.append(sequence(index, priority=action))
            queue.add(waiting[-1], deadline_s=index)
        assert len(queue) == len(waiting)
        assert queue.num_tokens == 8 * len(waiting)
        assert queue.num_token_steps == 40 * len(waiting)
        assert list(queue) == sorted(waiting, key=lambda s: (s.request.priority, s.seq_id))


def test_what_left_is_not_kept():
    queue = queue_of(sequence(0, priority=9))
    for seq_id in range(1, 5000):
        queue.add(sequence(seq_id), deadline_s=1e9)
        queue.pop()
        if queue.head() is None:
            queue.add(sequence(-seq_id, priority=9))
        for heap in (queue._ranks, queue._ages, queue._deadlines):
            assert len(heap._keys) <= 70
