"""What is recorded of requests and stages."""

import pytest

from gllm_ray.messages import FinishReason
from gllm_ray.simulation.metrics import (
    IdleCause,
    RequestMetrics,
    RequestProgress,
    Slo,
    StageTimeUse,
    TimeWeightedMean,
)


def serve(metrics, arrival_s, scheduled_s, token_times_s, reason=FinishReason.LENGTH, **others):
    """A request from its arrival to its end."""
    request = RequestProgress(arrival_s=arrival_s, num_prompt_tokens=10, **others)
    request.first_scheduled_s = scheduled_s
    for time_s in token_times_s:
        metrics.on_tokens([request], time_s)
    metrics.on_end(request, reason)
    return request


def test_latencies_are_counted_from_the_arrival():
    metrics = RequestMetrics()
    request = serve(metrics, 1.0, 1.5, [3.0, 3.25, 4.0], FinishReason.STOP, num_preemptions=2)
    assert (request.first_token_s, request.last_token_s, request.num_output_tokens) == (3, 4, 3)
    assert metrics.queue_s.mean == 0.5
    assert metrics.ttft_s.mean == 2.0
    assert metrics.e2e_s.mean == 3.0
    assert metrics.tpot_s.mean == 0.5
    assert list(metrics.itl_s.items()) == [(0.25, 1), (0.75, 1)]
    assert (metrics.num_input_tokens, metrics.num_output_tokens) == (10, 3)
    assert metrics.num_preemptions == 2


def test_the_first_token_has_no_itl_and_a_request_of_one_token_no_tpot():
    metrics = RequestMetrics()
    serve(metrics, 0.0, 0.0, [1.0])
    serve(metrics, 0.0, 0.0, [1.0, 3.0])
    assert (metrics.tpot_s.count, metrics.itl_s.count, metrics.ttft_s.count) == (1, 1, 2)
    assert metrics.tpot_s.mean == 2.0


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.ERROR, FinishReason.EXPIRED])
def test_a_request_that_got_less_than_it_asked_for_is_counted_but_not_measured(reason):
    metrics = RequestMetrics(Slo())
    serve(metrics, 0.0, 0.0, [1.0, 2.0], reason)
    assert metrics.num_ended[reason] == 1
    assert (metrics.num_good, metrics.num_output_tokens, metrics.e2e_s.count) == (0, 0, 0)


def test_a_request_cannot_finish_without_a_token():
    request = RequestProgress(arrival_s=0.0, num_prompt_tokens=1)
    with pytest.raises(ValueError, match="must be scheduled and have a token"):
        RequestMetrics().on_end(request, FinishReason.STOP)
    RequestMetrics().on_end(request, FinishReason.EXPIRED)


@pytest.mark.parametrize(
    ("slo", "token_times_s", "is_good"),
    [
        (Slo(ttft_s=1.0), [1.0, 9.0], True),
        (Slo(ttft_s=1.0), [1.01], False),
        (Slo(tpot_s=0.5), [9.0, 9.5, 10.0], True),
        (Slo(tpot_s=0.5), [0.0, 0.1, 1.2], False),
        (Slo(tpot_s=0.5), [9.0], True),  # no TPOT to exceed
        (Slo(tpot_s=0.5, ttft_s=1.0), [9.0], False),
        (Slo(e2e_s=2.0), [1.0, 2.0], True),
        (Slo(e2e_s=2.0), [1.0, 2.1], False),
        (Slo(), [99.0], True),
        (None, [99.0], True),
    ],
)
def test_a_good_request_keeps_every_limit_that_is_given(slo, token_times_s, is_good):
    metrics = RequestMetrics(slo)
    serve(metrics, 0.0, 0.0, token_times_s)
    assert metrics.num_good == is_good


def test_a_stage_adds_up_its_time():
    use = StageTimeUse(busy_s=3.0)
    use.idle_s[IdleCause.UPSTREAM] += 1.0
    other = StageTimeUse(busy_s=1.0)
    other.idle_s[IdleCause.NO_WORK] += 0.5
    use.add(other)
    assert (use.busy_s, use.total_s) == (4.0, 5.5)
    assert use.idle_s == {
        IdleCause.NO_WORK: 0.5,
        IdleCause.UPSTREAM: 1.0,
        IdleCause.SCHEDULER: 0.0,
        IdleCause.REPAIR: 0.0,
    }


def test_a_mean_over_time_weighs_a_value_by_how_long_it_held():
    value = TimeWeightedMean(start_s=10.0)
    for level, now_s in ((1.0, 11.0), (0.25, 12.0), (0.25, 16.0)):
        value.set(level, now_s)
    assert (value.integral, value.duration_s, value.peak) == (0 + 1 + 4 * 0.25, 6.0, 1.0)
    with pytest.raises(ValueError, match=r"now_s=15\.0: must be >= 16\.0"):
        value.set(0.0, 15.0)
