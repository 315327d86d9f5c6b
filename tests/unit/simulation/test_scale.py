"""Deep pipelines, many replicas and long runs: what a simulation takes does not grow with them."""

import gc
import tracemalloc
from typing import get_args

import pytest

from gllm_ray.messages import FinishReason
from gllm_ray.simulation import quantile_sketch, simulate
from gllm_ray.simulation.routing import RoutingName
from gllm_ray.simulation.run import build_deployment
from gllm_ray.simulation.simulation_config import parse_simulation_config
from gllm_ray.simulation.simulator import Simulation
from gllm_ray.simulation.workload import Workload
from tests.unit.simulation.simulations import changed

SHORT = {"prompt": {"name": "uniform", "min_tokens": 10, "max_tokens": 90}, "output": 4}
STEADY = {
    "workload.arrivals": 60,
    "workload.lengths": SHORT,
    "kv_cache": {"num_blocks": 200},
    "num_replicas": 2,
}


NO_SKETCHES = [tracemalloc.Filter(False, quantile_sketch.__file__)]


def run(num_requests, changes):
    """The report, the peak of the memory in bytes, and the allocations left but for sketches."""
    config = parse_simulation_config(
        changed(STEADY | {"workload.num_requests": num_requests} | changes)
    )
    tracemalloc.start()
    try:
        simulation = Simulation(build_deployment(config), Workload(config.workload, config.seed))
        report = simulation.run().report
        peak_bytes = tracemalloc.get_traced_memory()[1]
        gc.collect()
        left = tracemalloc.take_snapshot().filter_traces(NO_SKETCHES).statistics("filename")
        return report, peak_bytes, sum(statistic.count for statistic in left)
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
    monkeypatch.setattr(quantile_sketch.QuantileSketch.__init__, "__defaults__", (0,))
    run(50, changes)  # what is cached for the life of the process
    _, few_peak_bytes, few_left = run(300, changes)
    report, many_peak_bytes, many_left = run(1200, changes)
    assert sum(report.num_ended.values()) == 1200
    # Bounded tables may still fill up; what each request left behind would be 900 or more.
    assert many_left - few_left < 900 * 0.25
    # Sketches have some more buckets, and dictionaries some room; a request takes far more.
    assert many_peak_bytes - few_peak_bytes < 900 * 100


def test_64_stages_serve_every_request():
    layers = {"model.config.num_hidden_layers": 64, "pipeline.num_stages": 64}
    report = simulate(changed(layers | {"workload.arrivals": "at_once"})).report
    assert report.num_ended[FinishReason.LENGTH] == 40
    assert report.num_output_tokens == 40 * 20
    assert len(report.stages) == 64
    assert min(stage.utilization for stage in report.stages) > 0


@pytest.mark.parametrize("routing", get_args(RoutingName))
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
