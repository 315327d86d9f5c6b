"""When micro-batches pass the stages."""

from math import exp
from random import Random

import pytest

from gllm_ray.errors import ConfigError
from gllm_ray.scheduling.load import StepLoad
from gllm_ray.simulation.metrics import IdleCause, PipelineMetrics
from gllm_ray.simulation.virtual_pipeline import (
    Slowdown,
    Timing,
    VirtualPipeline,
    mixed_links,
    uniform_links,
)
from tests.unit.simulation.tiny import TOKEN_BYTES, linear_cost, link

LOAD = StepLoad(num_prefill_tokens=10)
SLOW_LINK = link(latency_s=0.5, bandwidth_bytes_s=10 * TOKEN_BYTES / 4)  # 4 s of bytes for LOAD


def make_pipeline(num_stages, timing=None, intervals=None):
    return VirtualPipeline(
        linear_cost(num_stages),
        timing or Timing(),
        PipelineMetrics(num_stages),
        Random(0),
        intervals,
    )


def result_times_s(pipeline, count=1, now_s=0.0):
    return [pipeline.submit(batch_id, LOAD, now_s)[0] for batch_id in range(count)]


@pytest.mark.parametrize("num_stages", [1, 2, 5])
def test_micro_batches_follow_each_other_through_the_stages(num_stages):
    pipeline = make_pipeline(num_stages)
    assert result_times_s(pipeline, 6) == [num_stages + index for index in range(6)]


def test_a_transfer_takes_its_latency_and_its_bytes_and_waits_for_the_one_before():
    pipeline = make_pipeline(2, Timing(links=(SLOW_LINK,)))
    assert result_times_s(pipeline, 3) == [1 + 4.5 + 1, 1 + 8.5 + 1, 1 + 12.5 + 1]


def test_a_stage_that_does_not_overlap_its_sends_computes_after_them():
    pipeline = make_pipeline(2, Timing(links=(SLOW_LINK,), is_send_overlapped=False))
    assert result_times_s(pipeline, 2) == [6.5, 5.5 + 6.5]


def test_links_that_are_not_one_between_each_two_neighbours_are_refused():
    with pytest.raises(ConfigError, match="2 links for 2 stages; give 1"):
        make_pipeline(2, Timing(links=(SLOW_LINK, SLOW_LINK)))


def test_links_by_node_are_the_inner_one_within_and_the_outer_one_between():
    inner, outer = link(0.1, 1.0), link(0.2, 1.0)
    assert mixed_links(inner, outer, [2, 3]) == (inner, outer, inner, inner)
    assert uniform_links(inner, 3) == (inner, inner)
    assert uniform_links(None, 3) == ()


def test_dispatch_and_result_each_add_their_latency():
    assert result_times_s(make_pipeline(3, Timing(dispatch_s=0.25, result_s=0.5))) == [3.75]


@pytest.mark.parametrize("now_s", [0.0, 3.25, 3.5, 5.0])
def test_a_micro_batch_that_continues_another_starts_a_dispatch_after_its_result(now_s):
    pipeline = make_pipeline(3, Timing(dispatch_s=0.25, result_s=0.25))
    assert pipeline.submit(0, LOAD, 0.0)[0] == 3.5
    assert pipeline.submit(1, LOAD, now_s, continues=0)[0] == max(now_s, 3.5) + 3.5


def test_a_slow_stage_slows_what_begins_while_it_is_slow():
    slow = Slowdown(stage_id=1, start_s=2.0, end_s=4.5, factor=3.0)
    intervals = []
    pipeline = make_pipeline(2, Timing(slowdowns=(slow,)), intervals)
    result_times_s(pipeline, 4)
    pipeline.close(100.0)
    spans = [(each.start_s, each.end_s) for each in intervals if each.stage_id == 1]
    assert spans == [(1, 2), (2, 5), (5, 6), (6, 7)]


def test_jitter_has_the_mean_of_its_distribution():
    pipeline = make_pipeline(1, Timing(jitter=0.4))
    mean_s = result_times_s(pipeline, 5000)[-1] / 5000
    assert mean_s == pytest.approx(exp(0.4**2 / 2), rel=0.02)


def test_idle_time_is_divided_by_cause_and_what_has_none_waits_for_an_upstream():
    pipeline = make_pipeline(2)
    pipeline.note_idle(0.0, 3.0, IdleCause.NO_WORK)
    pipeline.note_idle(3.0, 3.5, IdleCause.SCHEDULER)
    pipeline.submit(0, LOAD, 3.5)
    pipeline.close(6.0)
    first, last = pipeline.metrics.stages
    idle_s = {"no_work": 3.0, "scheduler": 0.5, "repair": 0.0, "upstream": 1.5}
    assert first.idle_s == last.idle_s == idle_s
    assert (first.busy_s, last.busy_s) == (1.0, 1.0)


def test_what_was_under_way_at_a_restart_is_not_counted_and_delays_nothing():
    intervals = []
    pipeline = make_pipeline(3, intervals=intervals)
    result_times_s(pipeline, 4)
    pipeline.restart(2.5)
    assert [stage.busy_s for stage in pipeline.metrics.stages] == [2.5, 1.5, 0.5]
    assert [stage.total_s for stage in pipeline.metrics.stages] == [2.5] * 3
    assert max(each.end_s for each in intervals) == 2.5
    assert result_times_s(pipeline, 1, now_s=2.5) == [5.5]
    pipeline.close(10.0)
    assert [stage.busy_s for stage in pipeline.metrics.stages] == [3.5, 2.5, 1.5]
    assert [stage.total_s for stage in pipeline.metrics.stages] == [10.0] * 3
