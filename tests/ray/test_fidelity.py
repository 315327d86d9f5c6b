"""The engine against the simulator, on the demo model and a few requests."""

import asyncio
import json
from math import isfinite

from gllm_ray.bench.fidelity import bench_fidelity
from gllm_ray.bench.fidelity_models import fidelity_service
from gllm_ray.simulation.length_config import LengthsConfig

LENGTHS = LengthsConfig.model_validate(
    {"prompt": {"name": "uniform", "min_tokens": 8, "max_tokens": 40}, "output": 12}
)


def bench(tmp_path, num_requests, steps):
    return asyncio.run(
        bench_fidelity(
            fidelity_service("demo", tmp_path),
            LENGTHS,
            num_requests=num_requests,
            num_repeats=2,
            loads=(0.5,),
            on_step=steps.append,
        )
    )


def test_engine_and_simulator_are_compared_at_each_load(ray_cluster, tmp_path):
    steps = []
    result = bench(tmp_path, 12, steps)
    assert [(each.load, each.rate_per_s is None) for each in result.comparisons] == [
        ("all at once", True),
        ("50%", False),
    ]
    for each in result.comparisons:
        assert len(each.measured) == len(each.simulated) == 2
        for figures in (*each.measured, *each.simulated):
            assert figures.requests_per_s > 0
            assert 0 < figures.ttft_p50_s <= figures.ttft_p99_s < 60
            assert 0 < figures.tpot_p50_s <= figures.tpot_p99_s < 60
        assert all(isfinite(line.error) and line.noise >= 0 for line in each.errors)
        assert each.stage_slowdown > 0
    (throughput, *_) = result.comparisons[0].errors
    assert throughput.name == "requests_per_s"
    assert 0.5 < throughput.simulated / throughput.measured < 2, "within what a busy machine varies"
    assert "demo/model" in result.provenance
    assert min(result.costs.dispatch_s, result.costs.hop_s, result.costs.result_s) > 0
    half = json.loads(json.dumps(result.to_json()))["comparisons"][1]
    assert half["load"] == "50%"
    assert [error["name"] for error in half["errors"]] == list(half["measured"][0])
    assert len(result.table().splitlines()) == 1 + 2 * (1 + len(half["errors"]))
    assert steps[0] == "starting the engine"
    assert steps[-1] == "simulating"
