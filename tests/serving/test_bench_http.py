"""`gllm-ray bench serve` and `compare` against processes that serve, and our own routes."""

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from gllm_ray.bench import request_run
from gllm_ray.bench.completions_client import CompletionsClient
from gllm_ray.bench.load_generator import send_load
from gllm_ray.bench.prompts import LoadRequest
from gllm_ray.bench.request_figures import RequestFigures
from gllm_ray.bench.target import TargetOptions, start_target
from gllm_ray.cli import main
from gllm_ray.errors import PipelineError
from tests.fakes import LocalService, ScriptedPipeline
from tests.serving.local_api import listening

SERVER = Path(__file__).with_name("sse_server.py")


def server(token_s, *more):
    return f"'{sys.executable}' '{SERVER}' {{port}} {token_s} {' '.join(map(str, more))}"


def bench(tmp_path, *arguments):
    """The exit status, and the result."""
    options = ["--input-len", "5", "--num-warmups", "1", "--json", str(tmp_path / "result.json")]
    status = main(["bench", *arguments, *options])
    return status, json.loads((tmp_path / "result.json").read_text())


def test_a_service_that_a_command_starts_is_measured_and_ended(tmp_path):
    token_s = 0.02
    status, result = bench(
        tmp_path,
        "serve",
        server(token_s),
        *["--num-prompts", "6", "--output-len", "4", "--max-concurrency", "3"],
        *["--goodput", "ttft:5000"],
    )
    assert status == 0
    figures = result["run"]["figures"]
    assert (figures["num_finished"], figures["num_failed"]) == (6, 0)
    assert (figures["num_input_tokens"], figures["num_output_tokens"]) == (30, 24)
    assert figures["tpot_s"]["p50"] == pytest.approx(token_s, rel=0.5)
    assert figures["ttft_s"]["p50"] > token_s
    assert figures["wall_s"] > 2 * 4 * token_s  # three at a time
    assert figures["goodput_ratio"] == 1
    assert set(result["run"]["conditions"]["cpu_s"]) == {"client", "service"}
    assert not [each for each in psutil.process_iter(["cmdline"]) if _is_server(each)]


def _is_server(process):
    return str(SERVER) in (process.info["cmdline"] or [])


def test_the_slower_of_two_services_loses_every_pair(tmp_path, capsys):
    status, result = bench(
        tmp_path,
        "compare",
        server(0.01),
        server(0.1),
        *["--num-prompts", "4", "--output-len", "5", "--pairs", "2"],
    )
    assert status == 0
    assert len(result["pairs"]) == 2
    for name, is_more in (("output_tokens_per_s", True), ("tpot_p50_s", False)):
        ratio = result["ratios"][name]
        assert all((each > 1.5) if is_more else (each < 0.7) for each in ratio["pairs"])
        assert ratio["least"] <= ratio["median"] <= ratio["most"]
    output, steps = capsys.readouterr()
    assert "| 2 A/B |" in output
    assert [line[-1] for line in steps.splitlines() if line.startswith("pair")] == list("ABAB")


def test_only_the_service_that_is_measured_runs(tmp_path, monkeypatch):
    seen = []

    async def count_servers(*arguments, **options):
        seen.append([_is_server(each) for each in psutil.process_iter(["cmdline"])].count(True))
        return await send_load(*arguments, **options)

    monkeypatch.setattr(request_run, "send_load", count_servers)
    arguments = ["--num-prompts", "2", "--output-len", "2", "--pairs", "2"]
    assert bench(tmp_path, "compare", server(0.01), server(0.01), *arguments)[0] == 0
    assert seen == [1] * 4


def test_requests_that_fail_are_told_and_their_pair_has_no_ratio(tmp_path, capsys):
    arguments = ["--num-prompts", "4", "--output-len", "2", "--pairs", "1"]
    status, result = bench(tmp_path, "compare", server(0), server(0, 4), *arguments)
    assert status == 1
    assert result["pairs"][0]["b"]["figures"]["num_failed"] == 1
    assert result["ratios"]["output_tokens_per_s"]["pairs"] == [None]
    assert "1 requests failed: status 503" in capsys.readouterr().err


def test_a_bench_in_the_background_is_ended_by_sigterm_with_what_it_started():
    command = [sys.executable, "-m", "gllm_ray.cli", "bench", "serve", server(30)]
    in_background = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", *command]
    with subprocess.Popen(in_background, stderr=subprocess.DEVNULL) as process:
        while not (servers := _servers_of(process)):
            assert process.poll() is None
            time.sleep(0.1)
        process.terminate()
        assert process.wait(20) == 128 + signal.SIGINT
        assert not any(each.is_running() for each in servers)


def _servers_of(process):
    children = psutil.Process(process.pid).children()
    return [each for each in children if str(SERVER) in each.cmdline()]


def test_a_command_that_ends_is_a_failure_with_what_it_said(capsys):
    command = f"'{sys.executable}' -c 'print(\"no model\"); raise SystemExit(3)' {{port}}"
    assert main(["bench", "serve", command]) == 1
    error = capsys.readouterr().err
    assert "ended with status 3" in error
    assert "no model" in error


def test_a_service_that_never_answers_is_given_up(capsys):
    command = f"'{sys.executable}' -c 'import time; time.sleep(60)' {{port}}"
    assert main(["bench", "serve", command, "--timeout-s", "1"]) == 1
    waiting, given_up = capsys.readouterr().err.splitlines()
    assert "waiting for it up to 1 s: ClientConnectorError" in waiting
    assert "not ready after 1 s: ClientConnectorError" in given_up


@pytest.mark.parametrize("path", ["", "/v1"])
def test_a_service_that_refuses_what_is_sent_is_not_waited_for(tokenizer, path):
    async def run():
        async with (
            LocalService(tokenizer, ScriptedPipeline([5])) as service,
            listening(service) as url,
        ):
            options = ["bench", "serve", url + path, "--timeout-s", "20"]
            options += ["--extra-body", '{"foo": 1}']
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "gllm_ray.cli", *options), stderr=subprocess.PIPE
            )
            _, errors = await process.communicate()
            return process.returncode, errors.decode()

    status, errors = asyncio.run(run())
    assert status == 1
    assert "status 400: " in errors
    assert "foo" in errors
    assert "waiting" not in errors


async def ask(tokenizer, model, *, others=()):
    """Start a service of the model `LocalService` has and others; how often each was asked."""
    async with contextlib.AsyncExitStack() as stack:
        names = [LocalService.model_name, *others]
        services = []
        for name in names:
            service = LocalService(tokenizer, ScriptedPipeline([5]))
            services.append(await stack.enter_async_context(service))
            service.model_name = name
        options = TargetOptions(model=model, extra_body={}, timeout_s=20.0)
        url = await stack.enter_async_context(listening(*services))
        await stack.enter_async_context(start_target(url, options))
        return [len(service.requests) for service in services]


@pytest.mark.parametrize(("model", "asked"), [(None, [1, 0]), ("second", [0, 1])])
def test_one_of_several_models_is_asked_by_its_name(tokenizer, model, asked):
    assert asyncio.run(ask(tokenizer, model, others=["second"])) == asked


def test_a_model_that_is_not_among_several_is_refused_with_their_names(tokenizer):
    names = f"{LocalService.model_name}, second, but not 'third'"
    with pytest.raises(PipelineError, match=f"serves {names}: name one by --model"):
        asyncio.run(ask(tokenizer, "third", others=["second"]))


def test_an_only_model_is_asked_whatever_it_is_named(tokenizer):
    assert asyncio.run(ask(tokenizer, "directory/of/the/model")) == [1]


def measure_own(tokenizer, script, requests, **options):
    async def run():
        settings = {"ignore_eos": True, "extra_body": {}, "timeout_s": 20.0} | options
        async with (
            LocalService(tokenizer, ScriptedPipeline(script)) as service,
            listening(service) as url,
            CompletionsClient.open(url, **settings) as client,
        ):
            client.model = LocalService.model_name
            return RequestFigures.of(await send_load(client.send, requests))

    return asyncio.run(run())


def request(prompt, num_output_tokens=6, **fields):
    return LoadRequest(
        request_id="r",
        arrival_s=0.0,
        prompt=prompt,
        num_prompt_tokens=0,
        num_output_tokens=num_output_tokens,
        **fields,
    )


def test_our_own_routes_take_token_ids_and_text_and_tell_what_they_counted(tokenizer):
    script = tokenizer.encode("def f(x): return x + 1")
    requests = [request((1, 2, 3)), request("def f", tenant="a", priority=2)]
    figures = measure_own(tokenizer, script, requests)
    assert figures.errors == {}
    assert figures.num_input_tokens == 3 + len(tokenizer.encode("def f"))
    assert figures.num_output_tokens == 12


def test_an_output_that_ends_early_fails_unless_it_may(tokenizer):
    script = [*tokenizer.encode("yes"), *tokenizer.stop_token_ids]
    assert measure_own(tokenizer, script, [request((1,))]).num_output_tokens == 6
    free = measure_own(tokenizer, script, [request((1,))], ignore_eos=False)
    assert (free.num_failed, free.num_output_tokens) == (0, len(script))
    # `extra_body` wins: the output is asked for whole, and ends early.
    early = measure_own(tokenizer, script, [request((1,))], extra_body={"ignore_eos": False})
    assert list(early.errors) == [f"got {len(script)} output tokens; asked for 6"]


@pytest.mark.parametrize("key", ["priority", "expected_output_tokens"])
def test_what_a_client_says_is_sent_and_a_refusal_is_told_with_its_status(tokenizer, key):
    (reason,) = measure_own(tokenizer, [5], [request((1,), **{key: 2**40})]).errors
    assert reason.startswith("status 400: ")
    assert key in reason
