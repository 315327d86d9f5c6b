"""The simulator takes every decision that the engine takes."""

from collections import Counter
from random import Random

import pytest

from gllm_ray.messages import FinishReason
from gllm_ray.policy_config import (
    BalancedConfig,
    ChunkedPrefillConfig,
    PrefillFirstConfig,
    TemporalConfig,
    TokenThrottlingConfig,
)
from gllm_ray.scheduling import QueueLimits
from gllm_ray.scheduling.length_predictor import StatisticsPredictor
from gllm_ray.simulation.deployment import Deployment, StageLoss
from gllm_ray.simulation.simulator import Simulation
from gllm_ray.simulation.virtual_pipeline import Slowdown, Timing, uniform_links
from tests.factories import make_scheduler
from tests.unit.simulation.tiny import linear_cost, link, request
from tests.unit.simulation.virtual_time import run_engine

POLICIES = (
    TokenThrottlingConfig(),
    TokenThrottlingConfig(kv_threshold="adaptive"),
    ChunkedPrefillConfig(token_budget=64),
    ChunkedPrefillConfig(token_budget=256, tbt_target_s=0.05),
    PrefillFirstConfig(token_budget=256),
    TemporalConfig(),
    BalancedConfig(),
)
NUM_STAGES = 3
LINK = link(latency_s=1e-4, bandwidth_bytes_s=1e8)
TIMING = Timing(
    links=uniform_links(LINK, NUM_STAGES),
    dispatch_s=3e-4,
    result_s=7e-4,
    jitter=0.1,
    slowdowns=(Slowdown(stage_id=1, start_s=0.5, end_s=1.0, factor=3.0),),
)


def make_requests(seed):
    """Some alone, some in bursts of one moment; prefixes, tenants and open ends among them."""
    rng, now_s, requests = Random(seed), 0.0, []
    while len(requests) < 100:
        now_s += rng.expovariate(6)
        for _ in range(rng.choice((1, 1, 1, 2, 25))):
            output = rng.randint(1, 60)
            has_prefix = rng.random() < 0.3
            requests.append(
                request(
                    now_s,
                    prompt=rng.choice((17, 40, 90, 300)),
                    output=output,
                    max_tokens=rng.choice((None, 60)),
                    prefix_id=rng.randrange(2) if has_prefix else None,
                    num_prefix_tokens=16 if has_prefix else 0,
                    tenant=rng.choice(("a", "b")),
                    priority=rng.choice((0, 0, 1)),
                )
            )
    return requests


LOSSES = (StageLoss(time_s=1.0, recovery_s=0.4), StageLoss(time_s=3.1, recovery_s=0.05))


def make_deployment(policy, timeout_s, ring, losses=()):
    return Deployment(
        cost=linear_cost(NUM_STAGES, 4e-3, token_s=5e-5, context_token_s=1e-6),
        make_scheduler=lambda: make_scheduler(
            num_stages=NUM_STAGES,
            num_blocks=300,
            max_model_len=400,
            policy=policy,
            ring=ring,
            prefix_caching=True,
            fair_share=True,
            queue=QueueLimits(timeout_s=timeout_s, max_requests=60),
            predictor=StatisticsPredictor(),
        ),
        timing=TIMING,
        losses=losses,
    )


def run_both(deployment, requests, seed):
    """What the engine submits, and how many requests end how; what the simulator makes of them."""
    submitted, ends = run_engine(deployment, requests, seed)
    result = Simulation(deployment, requests, seed=seed, keep_decisions=True).run()
    assert result.decisions[0] == submitted
    num_refused = len(requests) - ends.total()
    assert +Counter(result.report.num_ended) == ends + Counter({FinishReason.EXPIRED: num_refused})
    return submitted, ends, result


@pytest.mark.parametrize("ring", [False, True], ids=["", "ring"])
@pytest.mark.parametrize("timeout_s", [None, 0.3])
@pytest.mark.parametrize("seed", [0, 1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_engine_and_simulator_form_the_same_micro_batches(policy, seed, timeout_s, ring):
    deployment, requests = make_deployment(policy, timeout_s, ring), make_requests(seed)
    submitted, ends, result = run_both(deployment, requests, seed)
    assert any(batch.continues is not None for batch in submitted) == ring
    assert (ends[FinishReason.EXPIRED] > 0) == (timeout_s is not None)
    is_careful = policy.name in ("temporal", "balanced")
    assert result.report.num_preemptions > 0 or is_careful or timeout_s is not None


@pytest.mark.parametrize("ring", [False, True], ids=["", "ring"])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_engine_and_simulator_form_the_same_micro_batches_when_stages_are_lost(policy, ring):
    deployment, requests = make_deployment(policy, 0.3, ring, LOSSES), make_requests(0)
    submitted, ends, _ = run_both(deployment, requests, 0)
    assert ends.keys() == {FinishReason.STOP, FinishReason.LENGTH, FinishReason.EXPIRED}
    assert max(item.epoch for batch in submitted for item in batch.sequences) >= 1
