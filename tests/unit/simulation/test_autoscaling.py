"""Replicas that come and go in virtual time."""

import weakref

import pytest

from gllm_ray.errors import ConfigError
from gllm_ray.messages import FinishReason
from gllm_ray.simulation.metrics import TimeWeightedMean
from gllm_ray.simulation.replica_config import SimulatedScalingConfig
from tests.unit.simulation.tiny import deployment, request, serial_scheduler, simulate

RULE = SimulatedScalingConfig(
    min_replicas=1,
    max_replicas=4,
    target_ongoing_requests=2,
    max_growth=4.0,
    upscale_delay_s=3.0,
    downscale_delay_s=5.0,
    interval_s=1.0,
    startup_s=10.0,
)
FROM_ZERO = SimulatedScalingConfig(
    min_replicas=0,
    max_replicas=2,
    target_ongoing_requests=4,
    upscale_delay_s=2.0,
    downscale_delay_s=5.0,
    interval_s=1.0,
    startup_s=10.0,
)


def test_requests_are_held_until_the_first_replica_has_started():
    deployed = deployment(num_replicas=0, scaling=FROM_ZERO)
    result = simulate(deployed, [request(0.5), request(0.75)])
    # Looked for at 1 s, started at 11 s, and two micro-batches of 1 s.
    assert result.report.wall_s == 13.0
    assert result.report.replicas.max == 1
    assert result.report.num_ended[FinishReason.LENGTH] == 2
    assert result.report.pipeline.utilization == pytest.approx(1.0)


def test_without_replica_and_autoscaling_nothing_is_served():
    with pytest.raises(ConfigError, match="at least 1"):
        deployment(num_replicas=0)


def test_new_replicas_serve_after_delay_and_startup():
    # Wanted at the look at 1 s, decided at 4 s, ready at 14 s.
    arrivals = [request(0.0, output=100)] * 8 + [request(13.5)] + [request(14.0)] * 3
    deployed = deployment(scaling=RULE, routing="least_outstanding")
    result = simulate(deployed, arrivals, keep_decisions=True)
    assert result.report.replicas.max == 4
    assert [len(batches) for batches in result.decisions[1:]] == [1, 1, 1]
    assert result.report.num_ended[FinishReason.LENGTH] == 12


def test_the_number_of_replicas_is_told_whenever_it_changes():
    deployed = deployment(scaling=RULE, routing="least_outstanding")
    result = simulate(deployed, [request(0.0, output=100)] * 8 + [request(200.0)])
    # More since 1 s. Of the 8, each has ended by 107 s, and the last 4 since 102 s.
    assert result.report.replicas.changes == ((0.0, 1), (4.0, 4), (107.0, 3), (113.0, 1))


def test_the_stages_are_busy_for_the_share_of_the_time_that_their_replicas_ran():
    deployed = deployment(scaling=RULE, routing="least_outstanding")
    arrivals = [request(0.0, output=100)] * 8 + [request(200.0)]
    result = simulate(deployed, arrivals, keep_intervals=True)
    starts_s = [start_s for start_s, _ in result.replica_spans_s]
    assert starts_s == [0.0, 14.0, 14.0, 14.0]
    assert result.replica_spans_s[0][1] == result.report.wall_s
    ran_s = sum(stop_s - start_s for start_s, stop_s in result.replica_spans_s)
    busy_s = sum(interval.end_s - interval.start_s for interval in result.intervals)
    assert busy_s / ran_s == pytest.approx(result.report.pipeline.utilization)


def test_100_replicas_may_come_for_a_tide_within_seconds_and_go_after_it():
    """A replica serves one request a second; 60 come, and then 1."""
    rule = SimulatedScalingConfig(
        min_replicas=2,
        max_replicas=100,
        target_ongoing_requests=1000,
        target_prefill_utilization=0.7,
        target_queue_time_s=3.0,
        upscale_delay_s=2.0,
        downscale_delay_s=20.0,
        interval_s=1.0,
        startup_s=5.0,
    )
    requests = [request(1.0 + index / 60) for index in range(60 * 60)]
    requests += [request(61.0 + index, output=2) for index in range(300)]
    result = simulate(
        deployment(num_replicas=2, scaling=rule, routing="least_outstanding"), requests
    )
    assert result.report.num_ended[FinishReason.LENGTH] == len(requests)
    # 60 a second at 70 %; later 2 are enough, and 2 stand in for those that still have a queue.
    (_, few), (more_s, most), (fewer_s, fewer), *_, (_, last) = result.report.replicas.changes
    assert (few, most, fewer, last) == (2, 86, 4, 2)
    assert more_s < 10
    assert 61 + rule.downscale_delay_s <= fewer_s < 90
    # Who came before there were more replicas waited, and hardly anybody else.
    assert result.report.ttft_s.p50 == 1.0


def test_a_replica_that_goes_finishes_what_it_holds_and_takes_no_more():
    rule = SimulatedScalingConfig(
        min_replicas=1,
        max_replicas=2,
        target_ongoing_requests=10,
        downscale_delay_s=3.0,
        interval_s=1.0,
    )
    deployed = deployment(num_replicas=2, scaling=rule, routing="round_robin")
    requests = [request(0.0, output=20)] * 2 + [request(30.0)] * 2
    result = simulate(deployed, requests, keep_decisions=True)
    assert result.report.num_ended[FinishReason.LENGTH] == 4
    first, second = result.decisions
    assert len(second) == 20
    assert len(first) == 22
    # It is gone after its 20 s, so it has no idle time.
    assert result.report.pipeline.utilization == pytest.approx((20 + 20 + 2) / (20 + 32))


@pytest.mark.parametrize("interval_s", [1.0, 2.0])
def test_a_replica_goes_once_the_step_is_through_that_it_submitted_ahead(interval_s):
    """The step after a request's last is under way when it ends, at 20.5 s."""
    rule = SimulatedScalingConfig(
        min_replicas=1,
        max_replicas=2,
        target_ongoing_requests=10,
        downscale_delay_s=3.0,
        interval_s=interval_s,
    )
    ring = serial_scheduler(1, ring=True, max_in_flight=2)
    deployed = deployment(num_replicas=2, scaling=rule, routing="round_robin", make=ring)
    requests = [request(0.5, output=output, max_tokens=50) for output in (30, 20)]
    result = simulate(deployed, requests, keep_intervals=True)
    of_second = [each for each in result.intervals if each.replica_id == 1]
    assert [each.end_s for each in of_second] == [1.5 + index for index in range(21)]
    # Both compute from 0.5 s on, one until 21.5 s, the other until its request ends at 30.5 s.
    assert result.report.wall_s == 30.5
    assert result.report.pipeline.utilization == pytest.approx((21 + 30) / (21.5 + 30.5))


def test_a_simulation_leaves_the_rule_as_it_was():
    deployed = deployment(scaling=RULE)
    requests = [request(float(index), output=50) for index in range(12)]
    assert simulate(deployed, requests) == simulate(deployed, requests)


def test_what_is_kept_does_not_grow_with_the_replicas_that_have_gone():
    rule = SimulatedScalingConfig(
        min_replicas=0,
        max_replicas=2,
        target_ongoing_requests=2,
        upscale_delay_s=0.0,
        downscale_delay_s=2.0,
        interval_s=1.0,
        startup_s=1.0,
    )
    schedulers, num_kept = [], []
    make = serial_scheduler(1)

    def make_and_count():
        num_kept.append(sum(scheduler() is not None for scheduler in schedulers))
        scheduler = make()
        schedulers.append(weakref.ref(scheduler))
        return scheduler

    deployed = deployment(num_replicas=0, scaling=rule, make=make_and_count)
    requests = [request(30.0 * wave, output=4) for wave in range(20) for _ in range(4)]
    result = simulate(deployed, requests)
    assert result.report.num_ended[FinishReason.LENGTH] == 80
    assert len(schedulers) == 40
    assert max(num_kept) == 1


def test_replicas_that_have_gone_count_in_the_report():
    """Two replicas, of which one goes after its 20 s: whether it has gone when all ends or not."""
    rule = SimulatedScalingConfig(
        min_replicas=1,
        max_replicas=2,
        target_ongoing_requests=10,
        downscale_delay_s=3.0,
        interval_s=1.0,
    )
    deployed = deployment(num_replicas=2, scaling=rule, routing="round_robin")
    first_two = [request(0.0, output=20)] * 2
    both, one_gone = (
        simulate(deployed, first_two + later).report for later in ([], [request(40.0, output=10)])
    )
    assert both.wall_s == 20.0
    assert both.pipeline.utilization == pytest.approx(1.0)
    assert one_gone.pipeline.utilization == pytest.approx((20 + 20 + 10) / (20 + 50))
    assert one_gone.kv_utilization_peak == both.kv_utilization_peak


def test_means_over_time_add_up_as_one_after_the_other():
    whole, total = TimeWeightedMean(), TimeWeightedMean()
    parts = [TimeWeightedMean(start_s) for start_s in (0.0, 2.0)]
    spans = [(0.5, 0.0, 1.5), (0.25, 2.0, 5.0)]
    for part, (value, start_s, end_s) in zip(parts, spans, strict=True):
        part.set(value, start_s)
        part.set(0.0, end_s)
        total.add(part)
    whole.set(0.5, 0.0)
    whole.set(0.25, 1.5)
    whole.set(0.0, 4.5)
    assert (total.integral, total.duration_s) == (whole.integral, whole.duration_s)
    assert total.peak == whole.peak
