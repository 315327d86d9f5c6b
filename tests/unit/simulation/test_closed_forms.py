"""Simulations whose numbers can be worked out by hand; a stage takes one second."""

from itertools import accumulate
from random import Random

import pytest

from gllm_ray.policy_config import (
    BalancedConfig,
    ChunkedPrefillConfig,
    TemporalConfig,
    TokenThrottlingConfig,
)
from gllm_ray.simulation.metrics import IdleCause
from gllm_ray.simulation.virtual_pipeline import Slowdown, Timing, uniform_links
from tests.unit.simulation.tiny import (
    TOKEN_BYTES,
    deployment,
    link,
    request,
    serial_scheduler,
    simulate,
)

# Each prefills 16 tokens at a time, so that every prompt of 16 is a micro-batch.
POLICIES = [
    TokenThrottlingConfig(max_prefill_tokens=16, min_prefill_tokens=16),
    ChunkedPrefillConfig(token_budget=16),
    TemporalConfig(prefill_tokens=16),
    BalancedConfig(token_budget=16, min_prefill_tokens=16),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@pytest.mark.parametrize("num_stages", [1, 2, 4, 8])
@pytest.mark.parametrize("num_batches", [1, 3, 20])
def test_uniform_micro_batches_leave_the_bubble_of_filling_and_draining(
    num_stages, num_batches, policy
):
    deployed = deployment(num_stages, make=serial_scheduler(num_stages, policy=policy))
    report = simulate(deployed, [request()] * num_batches).report
    num_steps = num_batches + num_stages - 1
    assert report.wall_s == num_steps
    assert report.pipeline.utilization == pytest.approx(num_batches / num_steps)
    bubble = sum(report.pipeline.bubble_ratio.values())
    assert bubble == pytest.approx((num_stages - 1) / num_steps)
    assert report.pipeline.bubble_ratio[IdleCause.UPSTREAM] == pytest.approx(bubble)


@pytest.mark.parametrize(("num_stages", "num_chunks"), [(1, 1), (4, 1), (1, 5), (4, 9)])
def test_a_lone_prompt_of_k_chunks_takes_k_and_the_depth_less_one(num_stages, num_chunks):
    report = simulate(deployment(num_stages), [request(2.0, prompt=16 * num_chunks)]).report
    assert report.ttft_s.mean == num_chunks + num_stages - 1


def test_a_decode_waits_for_the_whole_pipeline():
    report = simulate(deployment(4), [request(output=5)]).report
    assert report.tpot_s.mean == 4
    assert report.wall_s == 5 * 4


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_waiting_for_one_stage_is_that_of_a_queue_with_constant_service(load):
    rng = Random(0)
    requests = map(request, accumulate(rng.expovariate(load) for _ in range(25_000)))
    report = simulate(deployment(1), requests).report
    assert report.queue_s.mean == pytest.approx(load / (2 * (1 - load)), rel=0.05)  # M/D/1
    assert report.pipeline.utilization == pytest.approx(load, rel=0.02)
    assert report.pipeline.bubble_ratio[IdleCause.NO_WORK] == pytest.approx(1 - load, rel=0.05)


def test_a_hop_adds_its_latency_and_its_bytes():
    hop = link(latency_s=0.25, bandwidth_bytes_s=16 * TOKEN_BYTES / 0.5)
    deployed = deployment(3, timing=Timing(links=uniform_links(hop, 3)))
    assert simulate(deployed, [request()]).report.wall_s == pytest.approx(3 + 2 * (0.25 + 0.5))


def test_dispatch_and_result_add_to_each_token_and_a_slow_stage_to_its_own_time():
    timing = Timing(
        dispatch_s=0.125,
        result_s=0.25,
        slowdowns=(Slowdown(stage_id=1, start_s=0.0, end_s=2.0, factor=3.0),),
    )
    report = simulate(deployment(2, timing=timing), [request(output=2)]).report
    # The first token passes the slow stage, the second comes after it has recovered.
    assert report.ttft_s.mean == pytest.approx(0.125 + 1 + 3 + 0.25)
    assert report.tpot_s.mean == pytest.approx(0.125 + 2 + 0.25)


def test_a_slow_scheduler_sets_the_pace():
    timing = Timing(schedule_s=3.0, schedule_sequence_s=1.0)
    report = simulate(deployment(2, timing=timing), [request()] * 10).report
    assert report.wall_s == 10 * (3.0 + 1.0) + 2
    assert report.pipeline.bubble_ratio[IdleCause.SCHEDULER] > 0.5
