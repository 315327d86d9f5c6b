"""How many replicas there should be."""

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_ray.autoscaling import Autoscaler, DeploymentLoad, ReplicaSignals, SignalMeter
from gllm_ray.autoscaling_config import ScalingRule
from gllm_ray.messages import EngineLoad

IDLE = ReplicaSignals(
    num_waiting_tokens=0.0,
    arriving_tokens_per_s=0.0,
    drain_tokens_per_s=1000.0,
    prefill_capacity_tokens_per_s=1000.0,
    kv_utilization=0.0,
)

OVERLOADED = ReplicaSignals(
    num_waiting_tokens=1e6,
    arriving_tokens_per_s=1000.0,
    drain_tokens_per_s=1000.0,
    prefill_capacity_tokens_per_s=1000.0,
    kv_utilization=0.0,
)


def rule(**options):
    return ScalingRule(
        **{
            "min_replicas": 1,
            "max_replicas": 4,
            "target_ongoing_requests": 2,
            "max_growth": 4.0,
            "upscale_delay_s": 3.0,
            "downscale_delay_s": 5.0,
        }
        | options
    )


def signals(**values):
    return ReplicaSignals(**{field.name: 0.0 for field in fields(ReplicaSignals)} | values)


def load(num_requests=0, num_replicas=1, num_running=None, signals=()):
    num_running = num_replicas if num_running is None else num_running
    return DeploymentLoad(
        num_requests=num_requests,
        num_running=num_running,
        num_replicas=num_replicas,
        signals=signals,
    )


def decide_at_once(load, **options):
    now = {"upscale_delay_s": 0, "downscale_delay_s": 0}
    return Autoscaler(rule(**now | {"max_replicas": 1000} | options)).decide(load, 0.0)


def engine_load(**values):
    return EngineLoad(
        **{
            "num_requests": 0,
            "num_waiting_requests": 0,
            "num_waiting_tokens": 0,
            "num_in_flight": 0,
            "kv_utilization": 0.0,
            "num_preemptions": 0,
            "num_prefix_queried_tokens": 0,
            "num_prefix_hit_tokens": 0,
            "num_prompt_tokens": 0,
            "drain_tokens_per_s": 0.0,
            "prefill_capacity_tokens_per_s": 0.0,
        }
        | values
    )


def test_more_come_after_the_delay_and_no_more_than_the_most():
    autoscaler = Autoscaler(rule())
    wanted = [autoscaler.decide(load(100), float(now_s)) for now_s in range(5)]
    assert wanted == [1, 1, 1, 4, 1]


def test_fewer_come_after_their_delay_and_no_fewer_than_the_fewest():
    autoscaler = Autoscaler(rule())
    wanted = [autoscaler.decide(load(0, num_replicas=4), float(now_s)) for now_s in range(6)]
    assert wanted == [4, 4, 4, 4, 4, 1]


def test_a_break_in_what_is_wanted_starts_the_delay_anew():
    autoscaler = Autoscaler(rule())
    nums_requests = (4, 4, 2, 4, 4, 4, 4)
    wanted = [autoscaler.decide(load(num), float(s)) for s, num in enumerate(nums_requests)]
    assert wanted == [1, 1, 1, 1, 1, 1, 2]


def test_a_change_the_other_way_starts_the_delay_anew():
    autoscaler = Autoscaler(rule())
    looks = ((0, 8), (1, 0), (3, 8), (5, 8), (6, 8))
    assert [autoscaler.decide(load(num, num_replicas=2), s) for s, num in looks] == [2, 2, 2, 2, 4]


def test_a_change_goes_no_further_than_was_wanted_all_the_time():
    autoscaler = Autoscaler(rule())
    assert [autoscaler.decide(load(num), s) for s, num in ((0, 8), (1, 4), (3, 8))] == [1, 1, 2]
    autoscaler = Autoscaler(rule())
    fewer = [autoscaler.decide(load(num, num_replicas=4), s) for s, num in ((0, 0), (2, 6), (5, 0))]
    assert fewer == [4, 4, 3]


def test_the_first_replica_comes_at_once_and_only_for_a_request():
    autoscaler = Autoscaler(rule(min_replicas=0))
    assert autoscaler.decide(load(0, num_replicas=0), 0.0) == 0
    assert autoscaler.decide(load(100, num_replicas=0), 1.0) == 1


def test_the_last_replica_goes_alone_after_a_delay_of_its_own():
    autoscaler = Autoscaler(rule(min_replicas=0))
    counts, count = [], 4
    for now_s in range(12):
        count = autoscaler.decide(load(0, num_replicas=count, signals=[IDLE]), float(now_s))
        counts.append(count)
    assert counts == [4] * 5 + [1] * 6 + [0]


@pytest.mark.parametrize(
    ("options", "each"),
    [
        ({"target_queue_time_s": 2.0}, {"num_waiting_tokens": 6000, "arriving_tokens_per_s": 1600}),
        ({"target_prefill_utilization": 0.25}, {"arriving_tokens_per_s": 750}),
        ({"target_kv_utilization": 0.3}, {"kv_utilization": 0.9}),
    ],
    ids=lambda value: next(iter(value)),
)
def test_each_signal_wants_so_many_that_each_replica_bears_its_target(options, each):
    told = [replace(IDLE, **each)] * 5
    assert decide_at_once(load(num_replicas=5, signals=told), **options) == 15


def test_what_wants_most_decides():
    told = [signals(kv_utilization=0.8), signals(kv_utilization=0.8)]
    some = load(num_requests=7, num_replicas=2, signals=told)
    assert decide_at_once(some, target_kv_utilization=0.8) == 4
    assert decide_at_once(some, target_kv_utilization=0.2) == 8


def test_a_queue_says_nothing_while_no_rate_is_known():
    told = [signals(num_waiting_tokens=10**6)] * 2
    assert decide_at_once(load(num_replicas=2, signals=told)) == 1


def test_a_replica_that_never_had_a_queue_is_as_fast_as_those_that_had():
    told = [
        signals(num_waiting_tokens=4000, arriving_tokens_per_s=1200.0),
        signals(
            num_waiting_tokens=4000,
            arriving_tokens_per_s=1200.0,
            drain_tokens_per_s=1000.0,
            prefill_capacity_tokens_per_s=1000.0,
        ),
    ]
    assert decide_at_once(load(num_replicas=2, signals=told), target_queue_time_s=2.0) == 4


def test_no_more_are_wanted_while_those_start_that_a_queue_has_asked_for():
    told = [OVERLOADED]
    assert decide_at_once(load(signals=told), max_growth=2.0) == 2
    starting = load(num_replicas=2, num_running=1, signals=told)
    assert decide_at_once(starting, max_growth=2.0) == 2
    running = load(num_replicas=2, signals=told * 2)
    assert decide_at_once(running, max_growth=2.0) == 4


def test_how_slowly_prompts_once_waited_for_kv_blocks_keeps_no_replica():
    freed = signals(drain_tokens_per_s=0.3, arriving_tokens_per_s=2.0, kv_utilization=0.1)
    assert decide_at_once(load(1, num_replicas=3, signals=[freed] * 3)) == 1


def test_a_queue_that_is_no_longer_than_its_target_keeps_no_replica():
    told = [replace(IDLE, num_waiting_tokens=2000)] * 3
    assert decide_at_once(load(num_replicas=3, signals=told), target_queue_time_s=2.0) == 1


def test_a_queue_starts_at_least_one_replica():
    told = [OVERLOADED]
    assert decide_at_once(load(signals=told), max_growth=1.1) == 2


def test_a_queue_that_new_requests_can_avoid_keeps_replicas_for_them_and_starts_none():
    clogged = replace(IDLE, num_waiting_tokens=10**6, arriving_tokens_per_s=750.0)
    told = [clogged, clogged, IDLE, IDLE, IDLE, IDLE]
    options = {"target_prefill_utilization": 0.75}
    assert decide_at_once(load(num_replicas=6, signals=told), **options) == 4
    assert decide_at_once(load(num_replicas=3, signals=told[:3]), **options) == 4
    assert decide_at_once(load(num_replicas=3, signals=told[:3]), max_growth=1.1, **options) == 4
    assert decide_at_once(load(num_replicas=4, signals=told[:4]), **options) == 4


def test_what_is_found_in_the_prefix_cache_is_no_work():
    cached = {"num_prefix_queried_tokens": 1000, "num_prefix_hit_tokens": 750}
    meter = SignalMeter()
    meter.read(engine_load(), 0.0)
    told = meter.read(engine_load(num_prompt_tokens=400, num_waiting_tokens=80, **cached), 2.0)
    assert (told.arriving_tokens_per_s, told.num_waiting_tokens) == (50.0, 20.0)


looks = st.lists(
    st.tuples(
        st.floats(0.1, 5.0),
        st.integers(0, 50),
        st.lists(
            st.builds(
                ReplicaSignals,
                num_waiting_tokens=st.floats(0, 1e6),
                arriving_tokens_per_s=st.floats(0, 1e5),
                drain_tokens_per_s=st.sampled_from([0.0, 1e3, 1e4]),
                prefill_capacity_tokens_per_s=st.sampled_from([0.0, 1e3, 1e4]),
                kv_utilization=st.floats(0, 1),
            ),
            max_size=4,
        ),
    ),
    max_size=30,
)


@given(looks, st.integers(0, 3), st.integers(3, 6))
def test_whatever_is_told_the_number_keeps_its_bounds_and_its_delays(looks, low, high):
    limits = rule(min_replicas=low, max_replicas=high)
    autoscaler, count, now_s = Autoscaler(limits), low, 0.0
    changed_s = 0.0
    for step_s, num_requests, told in looks:
        now_s += step_s
        before = count
        count = autoscaler.decide(load(num_requests, before, signals=told), now_s)
        assert min(low, before) <= count <= high
        if before and count != before:
            delay_s = limits.upscale_delay_s if count > before else limits.downscale_delay_s
            assert now_s - changed_s >= delay_s
        if count != before:
            changed_s = now_s


def test_rates_are_those_since_the_last_reading():
    meter = SignalMeter()
    first = meter.read(engine_load(num_prompt_tokens=500), 10.0)
    second = meter.read(engine_load(num_prompt_tokens=700, kv_utilization=0.5), 14.0)
    assert (first.arriving_tokens_per_s, second.arriving_tokens_per_s) == (0.0, 50.0)
    assert second.kv_utilization == 0.5


def test_a_scheduler_that_begins_anew_counts_at_no_negative_rate():
    meter = SignalMeter()
    meter.read(engine_load(num_prompt_tokens=500), 0.0)
    assert meter.read(engine_load(num_prompt_tokens=20), 1.0).arriving_tokens_per_s == 0.0
    assert meter.read(engine_load(num_prompt_tokens=30), 2.0).arriving_tokens_per_s == 10.0
