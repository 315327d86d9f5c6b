"""Deep pipelines, many replicas and long runs: what a simulation takes does not grow with them."""

import tracemalloc

import pytest

from gllm_ray.messages import FinishReason
from gllm_ray.simulation import simulate
from gllm_ray.simulation.quantile_sketch import QuantileSketch
from tests.unit.simulation.simulations import changed

SHORT = {"prompt": {"name": "uniform", "min_tokens": 10, "max_tokens": 90}, "output": 4}
STEADY = {
    "workload.arrivals": 60,
    "workload.lengths": SHORT,
    "kv_cache": {"num_blocks": 200},
    "num_replicas": 2,
}


def peak_bytes(num_requests, changes):
    config = changed(STEADY | {"workload.num_requests": num_requests} | changes)
    tracemalloc.start()
    try:
        report = simulate(config).report
        return tracemalloc.get_traced_memory()[1], report
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "scheduler.policy": "balanced",
            "cost_model": "learnt",
            "workload.max_tokens": 8,
            "workload.shared_prefixes": {"count": 10, "tokens": 40},
            "workload.tenants": [{"name": "a"}, {"name": "b"}],
            "scheduler.fair_share": True,
            "scheduler.queue_timeout_s": 60.0,
        },
    ],
    ids=["plain", "everything"],
)
def test_memory_does_not_grow_with_the_requests_that_have_ended(changes, monkeypatch):
    # Sketches keep 16,384 values before they are bounded; here they are from the start.
    monkeypatch.setattr(QuantileSketch.__init__, "__defaults__", (0,))
    peak_bytes(50, changes)  # what is cached for the life of the process
    few, _ = peak_bytes(300, changes)
    many, report = peak_bytes(1200, changes)
    assert sum(report.num_ended.values()) == 1200
    assert many < 1.1 * few


def test_64_stages_serve_every_request():
    layers = {"model.config.num_hidden_layers": 64, "pipeline.num_stages": 64}
    report = simulate(changed(layers | {"workload.arrivals": "at_once"})).report
    assert report.num_ended[FinishReason.LENGTH] == 40
    assert report.num_output_tokens == 40 * 20
    assert len(report.stages) == 64
    assert min(stage.utilization for stage in report.stages) > 0


@pytest.mark.parametrize("routing", ["round_robin", "least_outstanding", "power_of_two"])
def test_1000_replicas_end_every_request_exactly_once(routing):
    scale = {
        "num_replicas": 1000,
        "routing": routing,
        "kv_cache": {"num_blocks": 128},
        "workload.arrivals": 20_000,
        "workload.lengths": SHORT,
        "workload.num_requests": 3000,
    }
    report = simulate(changed(scale)).report
    assert report.num_ended[FinishReason.LENGTH] == sum(report.num_ended.values()) == 3000
    assert report.num_output_tokens == 3000 * 4
