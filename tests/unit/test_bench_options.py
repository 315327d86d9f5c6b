"""Which requests the options of the command line stand for."""

import argparse

import pytest

from gllm_ray.bench.load_options import add_load_options, parse_load
from gllm_ray.bench.target import command_words
from gllm_ray.cli import main
from gllm_ray.errors import ConfigError
from gllm_ray.simulation.metrics import Slo


def load(*arguments):
    parser = argparse.ArgumentParser()
    add_load_options(parser)
    return parse_load(parser.parse_args(list(arguments)))


@pytest.fixture
def workload_file(tmp_path):
    path = tmp_path / "load.yaml"
    path.write_text(
        "model: anything\n"
        "workload: {arrivals: 4, lengths: {prompt: 8, output: 3}, num_requests: 5}\n",
        encoding="utf-8",
    )
    return path


def test_without_options_64_requests_come_at_once():
    requests = load().requests(0)
    assert len(requests) == 64
    assert {(each.arrival_s, len(each.prompt), each.num_output_tokens) for each in requests} == {
        (0.0, 256, 64)
    }


def test_a_file_may_be_that_of_a_simulation_and_options_change_it(workload_file):
    requests = load("--workload", str(workload_file)).requests(0)
    assert [len(each.prompt) for each in requests] == [8] * 5
    assert requests[-1].arrival_s > 0
    changed = load("--workload", str(workload_file), "--num-prompts", "2", "--request-rate", "inf")
    assert [each.arrival_s for each in changed.requests(0)] == [0.0, 0.0]


def test_a_trace_lies_beside_its_workload(tmp_path):
    (tmp_path / "trace.csv").write_text(
        "arrived_at,num_prefill_tokens,num_decode_tokens\n0,7,2\n1.5,9,4\n", encoding="utf-8"
    )
    file = tmp_path / "load.yaml"
    file.write_text("workload: {name: trace, path: trace.csv}", encoding="utf-8")
    requests = load("--workload", str(file)).requests(0)
    assert [(each.arrival_s, len(each.prompt)) for each in requests] == [(0.0, 7), (1.5, 9)]


def test_repeats_and_the_warm_up_have_the_same_lengths_and_other_prompts():
    same = load("--input-len", "sharegpt", "--num-prompts", "3", "--num-warmups", "3")
    first, second, warm_up = same.requests(0), same.requests(1), same.warm_up()
    for a, b, c in zip(first, second, warm_up, strict=True):
        assert len(a.prompt) == len(b.prompt) == len(c.prompt)
        assert len({a.prompt, b.prompt, c.prompt}) == 3
        assert len({a.request_id, b.request_id, c.request_id}) == 3


def test_goodput_is_given_in_milliseconds():
    assert load("--goodput", "ttft:500", "e2el:2e3").slo == Slo(ttft_s=0.5, e2e_s=2.0)
    assert load().slo is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--goodput", "itl:5"], "goodput='itl:5': must be KEY:MS"),
        (["--goodput", "ttft:fast"], "goodput='ttft:fast': must be KEY:MS"),
        (["--request-rate", "many"], "request_rate='many': must be a number > 0, or inf"),
        (["--request-rate", "-1"], "workload.arrivals=-1.0: must be a rate from 1e-06"),
        (["--output-len", "long"], "lengths.output='long': must be a number of tokens"),
        (["--workload", "missing.yaml"], "missing.yaml: No such file"),
    ],
)
def test_a_mistake_is_told_and_nothing_is_started(arguments, message, capsys):
    with pytest.raises(ConfigError) as caught:
        load(*arguments)
    assert message in str(caught.value)
    assert main(["bench", "engine", "configs/demo.yaml", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_lengths_stand_in_the_file_or_in_options(workload_file):
    with pytest.raises(ConfigError, match="--input-len and --output-len do not go with --workload"):
        load("--workload", str(workload_file), "--input-len", "9")


def test_a_command_gets_its_port_and_its_model():
    words = command_words("serve '{model}' --port {port} --name 'a b'", 1234, "/models/a b")
    assert words == ["serve", "/models/a b", "--port", "1234", "--name", "a b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vllm serve", "must be an address that begins with http://, a Serve configuration"),
        ("vllm serve {model} --port {port}", r"has {model} in it, but no model is given"),
    ],
)
def test_a_command_that_cannot_be_filled_in_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        command_words(text, 1234, None)
