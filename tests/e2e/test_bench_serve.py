"""`gllm-ray bench serve` on the running demo."""

import json

from gllm_ray.cli import main


def test_the_running_service_is_measured_over_http(service, tmp_path, capsys):
    stage = next(pid for pid, title in service.titles().items() if "StageActor" in title)
    file = tmp_path / "serve.json"
    arguments = ["--num-prompts", "6", "--input-len", "20", "--output-len", "8"]
    arguments += ["--request-rate", "20", "--num-warmups", "2", "--pid", str(stage)]
    assert main(["bench", "serve", service.base_url, *arguments, "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    figures, conditions = result["run"]["figures"], result["run"]["conditions"]
    assert (figures["num_finished"], figures["num_failed"]) == (6, 0)
    assert (figures["num_input_tokens"], figures["num_output_tokens"]) == (120, 48)
    assert 0 < figures["ttft_s"]["p50"] < figures["e2e_s"]["p50"] < 30
    assert conditions["cpu_s"]["service"] > 0
    assert main(["bench", "table", str(file)]) == 0
    output = capsys.readouterr().out
    row = next(line for line in output.splitlines() if line.startswith("| serve |"))
    assert output.count(row) == 2  # what is printed is what `table` makes of the file
