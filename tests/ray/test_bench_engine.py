"""The benchmarks of engine, stages and transport, tiny, on a cluster of the tests."""

import asyncio
import json

import pytest

from gllm_ray.bench.bare_stages import run_bare_stages
from gllm_ray.bench.engine_bench import bench_engine
from gllm_ray.bench.recovery_bench import bench_recovery
from gllm_ray.bench.request_load import RequestLoad, parse_workload, synthetic_workload
from gllm_ray.bench.result_table import result_tables
from gllm_ray.bench.stage_bench import bench_stage
from gllm_ray.bench.transport_bench import bench_transport
from gllm_ray.errors import PipelineError
from tests.pipelines import make_batch, make_service_config

LOAD = RequestLoad(
    workload=parse_workload(synthetic_workload("12", "5") | {"num_requests": 6}),
    seed=0,
    max_concurrency=4,
    num_warmups=2,
    slo=None,
)


def test_an_engine_serves_a_workload_without_http(ray_cluster, tiny_llama, tmp_path):
    config = make_service_config(tiny_llama, num_stages=2)
    trace = tmp_path / "trace.json"
    result = asyncio.run(bench_engine("engine", config, LOAD, trace))
    figures = result["run"]["figures"]
    assert (figures["num_finished"], figures["errors"]) == (6, {})
    assert (figures["num_input_tokens"], figures["num_output_tokens"]) == (72, 30)
    assert figures["output_tokens_per_s"] == pytest.approx(30 / figures["wall_s"])
    assert 0 < figures["tpot_s"]["p50"] < figures["e2e_s"]["p50"]
    assert result["run"]["conditions"]["cpu_s"]["service"] > 0
    assert f"| engine | {tiny_llama} |" in result_tables([result])
    check_trace(trace)


def check_trace(file):
    """Each micro-batch comes to the second stage after it left the first, by a hop."""
    events = json.loads(file.read_text())["traceEvents"]
    starts, ends = (
        {each["args"]["batch_id"]: each["ts"] for each in events if each["ph"] == phase}
        for phase in "be"
    )
    events = [each for each in events if each["ph"] == "X"]
    first, second = (
        {each["args"]["batch_id"]: each for each in events if each["tid"] == stage_id}
        for stage_id in (0, 1)
    )
    assert len(first) >= 10
    assert first.keys() == second.keys()
    assert all(each["ts"] + each["dur"] < second[key]["ts"] for key, each in first.items())
    assert ends == {key: each["ts"] for key, each in second.items()}
    # Microseconds are rounded to three places.
    assert starts == pytest.approx({key: e["ts"] + e["dur"] for key, e in first.items()}, abs=0.01)


def test_bare_stages_run_the_micro_batches_that_were_served(ray_cluster, tiny_llama):
    config = make_service_config(tiny_llama, num_stages=2)
    steps = []
    result = asyncio.run(bench_stage(config, LOAD, num_rounds=1, on_step=steps.append))
    (each,) = result["rounds"]
    # 6 requests, 4 at a time, have at least 2 x 5 steps.
    assert each["num_micro_batches"] >= 10
    assert len(each["bare"]) == 2
    slowest_s = max(stage["wall_s"] for stage in each["bare"])
    assert each["served_over_bare"] == pytest.approx(slowest_s / each["served_s"])
    assert each["served_over_bare"] == result["served_over_bare"]
    assert all(stage["cpu_s"] > 0 for stage in each["bare"])
    assert steps == ["round 1 of 1: serving", "round 1 of 1: bare stages"]


def test_a_bare_stage_that_fails_is_an_error(tiny_llama):
    config = make_service_config(tiny_llama, num_stages=1)
    with pytest.raises(PipelineError, match="bare stage 0 ended"):
        run_bare_stages(config, [make_batch(0, [96])], num_blocks=32)  # no such token


@pytest.mark.slow
def test_the_phases_of_a_recovery_add_up_to_the_pause_of_the_streams(ray_cluster, tiny_llama):
    result = asyncio.run(
        bench_recovery(
            make_service_config(tiny_llama, num_stages=2),
            num_streams=3,
            input_len=20,
            output_len=90,
            num_kills=2,
            calm_s=0.1,
            on_step=lambda step: None,
        )
    )
    recoveries = result["recoveries"]
    assert [each["stage_id"] for each in recoveries] == [0, 1]
    for each in recoveries:
        phases = ("detect_s", "restart_s", "reload_s", "reconnect_s", "prefill_s")
        assert all(each[phase] > 0 for phase in phases)
        assert sum(each[phase] for phase in phases) == pytest.approx(each["pause_s"], rel=0.2)
    assert "| 3 x 20 + 90 | stage 1 |" in result_tables([result])


def test_hops_are_measured_for_each_transport_depth_and_size(ray_cluster):
    transports = ["object_store", "direct"]  # the last is by gloo, too
    result = asyncio.run(
        bench_transport(
            transports=transports,
            depths=[2],
            sizes=[4, 2**20],
            num_steps=32,
            on_step=lambda step: None,
        )
    )
    hops = result["hops"]
    assert [(hop["num_stages"], hop["num_bytes"], hop["transport"]) for hop in hops] == [
        (2, size, transport) for size in (4, 2**20) for transport in transports
    ]
    for hop in hops:
        assert 0 < hop["hop_s"]["p50"] < hop["step_s"]["p50"] < 10
    assert sum(hop["cpu_s"] for hop in hops) > 0  # a single one may take less than a clock tick
    assert "| 2 | 1 MiB |" in result_tables([result])
