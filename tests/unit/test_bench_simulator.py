import json

import pytest

from gllm_ray.bench.large_simulations import LargeCase, bench_large_simulations
from gllm_ray.cli import main
from gllm_ray.policy_config import BalancedConfig


def test_the_benchmark_tells_the_speed_of_each_depth(tmp_path, capsys):
    output = tmp_path / "speed.json"
    arguments = ["--policy", "balanced", "--stages", "1", "2", "--requests", "20"]
    assert main(["bench", "simulator", *arguments, "--output", str(output)]) == 0
    results = json.loads(output.read_text())
    assert [result["num_stages"] for result in results] == [1, 2]
    for result in results:
        spent_s = result["num_output_tokens"] / result["tokens_per_s"]
        assert spent_s == pytest.approx(result["processor_s"])
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_more_stages_than_layers_are_a_mistake_and_not_a_traceback(capsys):
    assert main(["bench", "simulator", "--stages", "65", "--requests", "20"]) == 1
    assert capsys.readouterr().err.startswith("pipeline.num_stages=65: the model has 64 layers")


def test_large_simulations_tell_what_each_number_of_requests_takes():
    case = LargeCase(
        num_stages=2,
        num_replicas=3,
        rate_per_s=30,
        lengths={"prompt": 20, "output": 5},
        nums_requests=(40, 80),
    )
    few, many = bench_large_simulations(BalancedConfig(), (case,))
    assert (few.num_requests, many.num_requests) == (40, 80)
    assert (few.num_output_tokens, many.num_output_tokens) == (200, 400)
    for result in (few, many):
        assert result.as_json()["tokens_per_s"] * result.processor_s == pytest.approx(
            result.num_output_tokens
        )
        assert f"{result.peak_bytes / 2**20:.0f} MiB" in result.table_row()
        assert 10 * 2**20 < result.peak_bytes < 2**30  # a process with an interpreter
