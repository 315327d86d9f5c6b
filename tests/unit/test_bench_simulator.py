import json

import pytest

from gllm_ray.cli import main


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
