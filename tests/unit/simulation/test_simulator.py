"""Laws of whole simulations: conservation, determinism, losses."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gllm_ray.errors import ConfigError
from gllm_ray.messages import FinishReason
from gllm_ray.policy_config import POLICY_CONFIGS, BalancedConfig
from gllm_ray.scheduling import QueueLimits
from gllm_ray.simulation.deployment import StageLoss
from gllm_ray.simulation.events import EventQueue
from gllm_ray.simulation.metrics import IdleCause
from gllm_ray.simulation.simulator import Simulation
from gllm_ray.simulation.virtual_pipeline import Timing
from tests.unit.simulation.tiny import deployment, linear_cost, request, serial_scheduler, simulate


def test_a_scheduler_that_is_never_idle_still_takes_new_requests():
    timing = Timing(schedule_s=2.0)
    requests = [request(output=400) for _ in range(2)] + [request(101.0)]
    report = simulate(deployment(2, timing=timing), requests).report
    assert report.ttft_s.p99 < 20


WORKLOADS = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.0, 0.5, 1.0, 7.0]),
        st.integers(1, 60),
        st.integers(1, 12),
        st.sampled_from([None, 12]),
    ),
    min_size=1,
    max_size=20,
)
# Multiples of a half, so that many things happen at one moment.
TIMINGS = st.builds(
    Timing,
    schedule_s=st.sampled_from([0.0, 0.5, 1.0]),
    schedule_sequence_s=st.sampled_from([0.0, 0.5]),
    dispatch_s=st.sampled_from([0.0, 0.5]),
    result_s=st.sampled_from([0.0, 0.5]),
    jitter=st.sampled_from([0.0, 0.3]),
)
LOSSES = st.lists(
    st.builds(
        StageLoss,
        time_s=st.sampled_from([0.0, 1.0, 2.5, 6.0, 11.0]),
        replica_id=st.integers(0, 2),
        recovery_s=st.sampled_from([0.0, 1.0, 10.0]),
    ),
    max_size=3,
)


def requests_of(workload):
    now_s, requests = 0.0, []
    for gap_s, prompt, output, max_tokens in workload:
        now_s += gap_s
        requests.append(request(now_s, prompt=prompt, output=output, max_tokens=max_tokens))
    return requests


@settings(deadline=None, max_examples=150)
@given(
    workload=WORKLOADS,
    timing=TIMINGS,
    losses=LOSSES,
    policy=st.sampled_from(sorted(POLICY_CONFIGS)),
    num_stages=st.sampled_from([1, 2, 4]),
    num_replicas=st.integers(1, 2),
    timeout_s=st.sampled_from([None, 4.0]),
)
def test_nothing_is_lost_or_counted_twice(
    workload, timing, losses, policy, num_stages, num_replicas, timeout_s
):
    requests = requests_of(workload)
    make = serial_scheduler(
        num_stages,
        policy=POLICY_CONFIGS[policy](),
        num_blocks=24,
        queue=QueueLimits(timeout_s=timeout_s),
    )
    deployed = deployment(
        num_stages, make=make, timing=timing, num_replicas=num_replicas, losses=tuple(losses)
    )
    simulation = Simulation(deployed, requests, keep_intervals=True)
    try:
        result = simulation.run()
    except ConfigError:
        assert sum(simulation._requests.num_ended.values()) == len(requests)
        return
    report = result.report
    ended = report.num_ended
    assert sum(ended.values()) == len(requests)
    assert ended[FinishReason.EXPIRED] == 0 or timeout_s is not None
    assert ended[FinishReason.ERROR] == 0
    if ended[FinishReason.LENGTH] + ended[FinishReason.STOP] == len(requests):
        assert report.num_input_tokens == sum(each.num_prompt_tokens for each in requests)
        assert report.num_output_tokens == sum(each.num_output_tokens for each in requests)
    for replica_id, replica in simulation._replicas.items():
        assert replica.num_requests == 0
        for stage_id, stage in enumerate(replica.metrics.stages):
            assert stage.total_s == pytest.approx(report.wall_s)
            assert all(idle_s >= 0 for idle_s in stage.idle_s.values())
            spans = sorted(
                (each.start_s, each.end_s)
                for each in result.intervals
                if (each.replica_id, each.stage_id) == (replica_id, stage_id)
            )
            assert sum(end_s - start_s for start_s, end_s in spans) == pytest.approx(stage.busy_s)
            assert all(a[1] <= b[0] for a, b in pairwise(spans))
    assert 0 <= report.pipeline.utilization <= 1


@settings(deadline=None, max_examples=40)
@given(workload=WORKLOADS, timing=TIMINGS, num_stages=st.sampled_from([1, 3]))
def test_no_work_is_the_time_without_requests(workload, timing, num_stages):
    lone = [(500.0, *others) for _, *others in workload]
    report = simulate(deployment(num_stages, timing=timing), requests_of(lone)).report
    served_s = report.e2e_s.mean * len(lone)
    for stage in report.stages:
        no_work_s = stage.bubble_ratio[IdleCause.NO_WORK] * report.wall_s
        assert no_work_s == pytest.approx(report.wall_s - served_s)


def test_the_same_arguments_give_the_same_result_and_the_seed_draws_the_jitter():
    deployed = deployment(4, num_replicas=3, timing=Timing(jitter=0.3, schedule_s=0.01))
    requests = [request(0.3 * index, prompt=20, output=9) for index in range(60)]
    first = simulate(deployed, requests, seed=1, keep_decisions=True, keep_intervals=True)
    again = simulate(deployed, requests, seed=1, keep_decisions=True, keep_intervals=True)
    other = simulate(deployed, requests, seed=2)
    assert first == again
    assert first.report.wall_s != other.report.wall_s


def test_a_loss_ends_no_request_and_delays_those_of_its_replica_alone():
    losses = (StageLoss(time_s=5.5, replica_id=1, recovery_s=30.0),)
    requests = [request(output=10)] * 4
    deployed = [
        deployment(2, num_replicas=2, routing="round_robin", losses=each) for each in ((), losses)
    ]
    undisturbed, disturbed = (simulate(each, requests).report for each in deployed)
    assert disturbed.num_ended[FinishReason.LENGTH] == 4
    assert disturbed.num_output_tokens == 40
    assert disturbed.wall_s > 30.0 + undisturbed.wall_s
    delay_s = disturbed.e2e_s.mean - undisturbed.e2e_s.mean
    assert delay_s == pytest.approx((disturbed.wall_s - undisturbed.wall_s) / 2, rel=0.02)


@pytest.mark.parametrize("num_stages", [1, 2])
def test_a_loss_costs_the_repair_the_step_under_way_and_another_prefill(num_stages):
    # Of one request, with 16 tokens to a micro-batch of 1 s for each stage.
    lost_s, recovery_s, num_output = 100.5, 4.0, 120
    losses = (StageLoss(time_s=lost_s, recovery_s=recovery_s),)
    result = simulate(
        deployment(num_stages, losses=losses), [request(prompt=48, output=num_output)]
    )

    def prefill_s(num_tokens):
        return -(-num_tokens // 16) + num_stages - 1

    num_before = 1 + int(lost_s - prefill_s(48)) // num_stages
    latest_s = prefill_s(48) + (num_before - 1) * num_stages
    resumed_s = lost_s + recovery_s + prefill_s(48 + num_before)
    assert result.report.wall_s == resumed_s + (num_output - num_before - 1) * num_stages
    assert result.requests.itl_s.max == resumed_s - latest_s
    assert result.report.num_preemptions == 1


def test_the_time_of_a_repair_with_requests_has_a_cause_of_its_own():
    losses = (StageLoss(time_s=2.0, recovery_s=6.0),)
    report = simulate(deployment(losses=losses), [request(5.0)]).report
    assert report.wall_s == 9.0
    shares = report.pipeline.bubble_ratio
    assert shares[IdleCause.NO_WORK] * 9 == pytest.approx(5.0)
    assert shares[IdleCause.REPAIR] * 9 == pytest.approx(3.0)
    assert shares[IdleCause.UPSTREAM] == 0.0


def test_who_waits_for_a_repair_longer_than_it_may_expires():
    make = serial_scheduler(1, queue=QueueLimits(timeout_s=2.0))
    losses = (StageLoss(time_s=0.5, recovery_s=6.0),)
    report = simulate(deployment(make=make, losses=losses), [request(), request(1.0)]).report
    assert report.num_ended[FinishReason.EXPIRED] == 1
    assert report.num_ended[FinishReason.LENGTH] == 1
    assert report.wall_s == 7.5


@pytest.mark.parametrize("recoveries_s", [(4.0, 8.0), (9.5, 1.0)])
def test_of_two_losses_at_a_time_the_longer_repair_counts(recoveries_s):
    losses = tuple(
        StageLoss(time_s=time_s, recovery_s=recovery_s)
        for time_s, recovery_s in zip((0.5, 2.0), recoveries_s, strict=True)
    )
    assert simulate(deployment(losses=losses), [request(1.0)]).report.wall_s == 11.0


def test_a_loss_while_idle_or_after_the_end_ends_nothing_and_adds_no_time():
    losses = (StageLoss(time_s=3.0, recovery_s=1.0), StageLoss(time_s=99.0))
    report = simulate(deployment(losses=losses), [request(0.0), request(5.0)]).report
    assert report.num_ended[FinishReason.LENGTH] == 2
    assert report.wall_s == 6.0


def test_a_loss_while_the_scheduler_works_discards_that_micro_batch():
    losses = (StageLoss(time_s=1.0, recovery_s=30.0),)
    deployed = deployment(timing=Timing(schedule_s=2.0), losses=losses)
    report = simulate(deployed, [request(0.0)]).report
    assert report.wall_s == 31.0 + 2.0 + 1.0
    assert report.stages[0].utilization * report.wall_s == pytest.approx(1.0)


def test_the_time_ends_with_the_last_request_not_with_the_last_deadline():
    make = serial_scheduler(1, queue=QueueLimits(timeout_s=1000.0))
    assert simulate(deployment(make=make), [request()] * 3).report.wall_s == 3.0


@pytest.mark.parametrize("requests", [[], [request(0.0, prompt=5000)]])
def test_a_workload_of_which_nothing_can_be_served_is_refused(requests):
    with pytest.raises(ConfigError, match="no time passed"):
        simulate(deployment(), requests)


def test_arrivals_must_ascend():
    with pytest.raises(ValueError, match="request 1 comes at"):
        simulate(deployment(), [request(2.0), request(1.0)])


def test_what_waits_to_happen_does_not_grow_with_the_workload(monkeypatch):
    sizes = []
    push = EventQueue.push

    def push_and_note(queue, *event):
        push(queue, *event)
        sizes.append(len(queue))

    monkeypatch.setattr(EventQueue, "push", push_and_note)
    make = serial_scheduler(2, queue=QueueLimits(timeout_s=1e6))
    cost = linear_cost(2, 0.01)
    requests = [request(0.1 * index, output=3) for index in range(300)]
    simulation = Simulation(deployment(2, cost=cost, make=make), requests)
    simulation.run()
    assert max(sizes) <= 6
    pipeline = simulation._replicas[0]._pipeline
    assert len(pipeline._causes) <= 6
    assert len(pipeline._passages) == 0


def test_a_batch_does_not_end_with_the_long_outputs_alone():
    requests = [request(output=8) for _ in range(1600)] + [request(output=300)] * 2
    wall_s = {}
    for overtaking in (0, 64):
        policy = BalancedConfig(overtaking=overtaking)
        make = serial_scheduler(2, policy=policy, num_blocks=400)
        wall_s[overtaking] = simulate(deployment(2, make=make), requests).report.wall_s
    long_s = 2 * 300
    assert wall_s[64] < wall_s[0] - 0.8 * long_s
