"""The command with real pipelines on a cluster, and with a service that runs."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import uvicorn
import yaml
from starlette.responses import JSONResponse, PlainTextResponse

from gllm_ray.batch.command import main, run_to_status
from gllm_ray.scheduling import QueueLimits
from gllm_ray.serving.openai_api import build_api
from tests.batch.local_job import make_line, read_lines, write_lines
from tests.fakes import LocalService, ScriptedPipeline

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The demo's, in one stage."""
    data = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    data["applications"][0]["args"]["pipeline"]["num_stages"] = 1
    path = tmp_path_factory.mktemp("config") / "demo.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def options(config, source, output, *more):
    return ["--config", str(config), "--input", str(source), "--output", str(output), *more]


@pytest.mark.timeout(240)
def test_a_file_runs_to_its_end_and_a_changed_model_does_not_resume(
    ray_cluster, config, tmp_path, capsys
):
    lines = [make_line(f"chat {i}") for i in range(5)]
    body = {"model": "gllm-ray-demo", "prompt": "a", "max_tokens": 3}
    lines.append({**make_line("text"), "url": "/v1/completions", "body": body})
    source = write_lines(tmp_path / "in.jsonl", lines)
    output = tmp_path / "out.jsonl"
    assert main(options(config, source, output)) == 0
    assert "6 of 6 rows in" in capsys.readouterr().out
    records = read_lines(output)
    assert [record["custom_id"] for record in records] == [line["custom_id"] for line in lines]
    assert records[0]["response"]["body"]["object"] == "chat.completion"
    usage = records[-1]["response"]["body"]["usage"]
    assert usage["completion_tokens"] == 3
    assert 0 <= usage["prompt_tokens_details"]["cached_tokens"] < usage["prompt_tokens"]
    manifest = json.loads((tmp_path / "out.jsonl.manifest.json").read_text())
    assert (manifest["num_rows"], manifest["num_failed"], manifest["is_complete"]) == (6, 0, True)

    assert main(options(config, source, output)) == 0  # done already, so nothing starts
    assert read_lines(output) == records
    changed = config.with_name("bfloat16.yaml")
    changed.write_text(config.read_text().replace("dtype: float32", "dtype: bfloat16"))
    assert main(options(changed, source, output)) == 1
    assert "model changed" in capsys.readouterr().err


@pytest.mark.parametrize(("suffix", "id_column"), [("csv", "number"), ("parquet", "custom_id")])
def test_a_table_comes_back_with_columns_of_answers(suffix, id_column, tokenizer, tmp_path, capsys):
    pa = pytest.importorskip("pyarrow", reason="the data extra is not installed")
    from pyarrow import csv as arrow_csv
    from pyarrow import parquet

    table = pa.table({"number": [1, 2, 3], "text": ["one", "two, or", "three"]})
    if id_column == "custom_id":
        table = table.append_column("custom_id", pa.array(["1", "2", "3"]))
    source = tmp_path / f"in.{suffix}"
    arrow_csv.write_csv(table, source) if suffix == "csv" else parquet.write_table(table, source)
    output = tmp_path / f"out.{suffix}"
    template = "Write {{ prompt }} {{ number }}."
    with http_service(tokenizer) as url:
        asked = ["--url", url, "--input", str(source), "--output", str(output)]
        asked += ["--prompt-column", "text", "--template", template, "--id-column", id_column]
        asked += ["--params"]
        assert main([*asked, '{"max_tokens": "4"}']) == 1
        error = capsys.readouterr().err
        assert f"{source}:3: max_tokens: must be a whole number, not text" in error
        assert main([*asked, '{"max_tokens": 4, "seed": 1}']) == 0
        read = arrow_csv.read_csv(output) if suffix == "csv" else parquet.read_table(output)
        assert main([*asked, '{"max_tokens": 5}']) == 1
        assert "requests changed" in capsys.readouterr().err
    assert read.column_names == [
        "number",
        "text",
        "custom_id",
        "generated_text",
        "num_input_tokens",
        "num_generated_tokens",
        "finish_reason",
    ]
    assert read.select(["number", "text"]).to_pylist() == table.select([0, 1]).to_pylist()
    assert list(map(str, read["custom_id"].to_pylist())) == ["1", "2", "3"]
    assert all(1 <= number <= 4 for number in read["num_generated_tokens"].to_pylist())


@pytest.mark.parametrize(
    ("source", "output", "more", "word"),
    [
        ("in.jsonl", "out.jsonl", [], "there is no such file"),
        ("here.jsonl", "nowhere/out.jsonl", [], "there is no directory"),
        ("here.jsonl", "out.csv", [], "must be JSONL when the input is .jsonl"),
        ("here.jsonl", "out.txt", [], "--output: the name must end with one of .jsonl"),
        ("here.jsonl", "out.jsonl", ["--template", "a"], "--template: must be left out"),
        ("here.jsonl", "out.jsonl", ["--timeout-s", "3"], "--timeout-s: must be left out"),
        ("here.jsonl", "out.jsonl", ["--api-key-env", "KEY"], "--api-key-env: must be left out"),
        ("here.jsonl", "nothing://a/out.jsonl", [], "cannot be opened"),
        ("here.jsonl", "here.jsonl", [], "must be another file than --input"),
        (
            "here.csv",
            "out.csv",
            ["--prompt-column", "text", "--params", '{"prompt": "b"}'],
            "--params: prompt must be left out, for the command sets it",
        ),
    ],
)
def test_a_mistake_in_the_options_ends_with_1(
    source, output, more, word, config, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "here.jsonl", [make_line("a")])
    (tmp_path / "here.csv").write_text("text\na\n")
    assert main(options(config, source, output, *more)) == 1
    assert word in capsys.readouterr().err


def test_a_column_that_the_output_has_no_place_for_is_refused_before_a_row_is_run(
    config, tmp_path, capsys
):
    pa = pytest.importorskip("pyarrow", reason="the data extra is not installed")
    from pyarrow import parquet

    source, output = tmp_path / "in.parquet", tmp_path / "out.csv"
    parquet.write_table(pa.table({"text": ["a"], "list": [[1]]}), source)
    assert main(options(config, source, output, "--prompt-column", "text")) == 1
    assert "CSV has no place for list of" in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == [source]


def test_a_relative_output_is_refused_in_a_ray_job(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    source = write_lines(tmp_path / "in.jsonl", [make_line("a")])
    assert main(options(config, source, "out.jsonl")) == 1
    assert "--output=out.jsonl: must be absolute, or a URI, in a Ray job" in capsys.readouterr().err


class KeyGateway:
    """Stands before the routes, and lets nobody through without a key."""

    def __init__(self, api, keys):
        self._api = api
        self._keys = keys

    async def __call__(self, scope, receive, send):
        shown = dict(scope.get("headers", ())).get(b"authorization", b"").decode()
        is_known = shown.removeprefix("Bearer ") in self._keys
        api = self._api if is_known else JSONResponse({"error": {"code": "invalid_api_key"}}, 401)
        await api(scope, receive, send)


@contextlib.contextmanager
def http_service(tokenizer, *, keys=None, wrap=None, **scheduler_options):
    """The routes over a scripted model, on a port of their own; yields the address.

    Args:
        tokenizer: The demo model's.
        keys: One of which a client must show; None: it need not.
        wrap: What else stands before the routes.
        scheduler_options: As `make_scheduler` takes them.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        script = [*tokenizer.encode("Hello"), *tokenizer.stop_token_ids]
        service = LocalService(tokenizer, ScriptedPipeline(script), **scheduler_options)
        api = build_api(service)
        if keys is not None:
            api = KeyGateway(api, keys)
        if wrap is not None:
            api = wrap(api)
        server = uvicorn.Server(uvicorn.Config(api, log_level="warning", lifespan="off"))

        async def serve():
            async with service:
                await server.serve([listener])

        thread = threading.Thread(target=lambda: asyncio.run(serve()))
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            while not server.started:
                time.sleep(0.01)
            yield url
        finally:
            server.should_exit = True
            thread.join()


def test_a_running_service_answers_and_a_row_it_refuses_ends_with_2(tokenizer, tmp_path, capsys):
    model = LocalService.model_name
    lines = [make_line(name, model=model) for name in "ab"]
    lines.insert(1, make_line("long", model=model, max_tokens=500))
    source = write_lines(tmp_path / "in.jsonl", lines)
    output = tmp_path / "out.jsonl"
    with http_service(tokenizer) as url:
        assert httpx.get(f"{url}/health").status_code == 200
        asked = ["--url", f"{url}/v1", "--input", str(source), "--output", str(output)]
        assert main(asked) == 2
    assert "2 of 3 rows" in capsys.readouterr().out
    records = read_lines(output)
    assert [record["custom_id"] for record in records] == ["a", "b"]
    content = [record["response"]["body"]["choices"][0]["message"]["content"] for record in records]
    assert content == ["Hello", "Hello"]
    (error,) = read_lines(tmp_path / "out.errors.jsonl")
    assert (error["custom_id"], error["error"]["code"]) == ("long", "context_length_exceeded")
    assert main(asked) == 1  # nobody tells any more which model it is
    assert "tells of no one model" in capsys.readouterr().err
    for url in ("here", "here:8000"):
        assert main(["--url", url, "--input", str(source), "--output", str(output)]) == 1
        assert f"--url={url}: must be an address as http://host:port" in capsys.readouterr().err


@pytest.mark.parametrize("told", [[], {"data": None}, {"data": ["a"]}, {"data": [{}]}])
def test_a_service_that_tells_of_no_model_as_openai_does_is_refused(
    told, tokenizer, tmp_path, capsys
):
    source = write_lines(tmp_path / "in.jsonl", [make_line("a")])
    with http_service(tokenizer, wrap=lambda _: JSONResponse(told)) as url:
        assert main(["--url", url, "--input", str(source), "--output", "out.jsonl"]) == 1
    assert f"{url}/v1/models: tells of no one model" in capsys.readouterr().err


def test_a_service_of_several_models_is_refused_with_their_names(tokenizer, tmp_path, capsys):
    source = write_lines(tmp_path / "in.jsonl", [make_line("a")])
    told = {"data": [{"id": "one"}, {"id": "two"}]}
    with http_service(tokenizer, wrap=lambda _: JSONResponse(told)) as url:
        assert main(["--url", url, "--input", str(source), "--output", "out.jsonl"]) == 1
    assert "has several models (one, two); a batch needs" in capsys.readouterr().err


class PageGateway:
    """Stands before the routes, and answers the first row with a page."""

    def __init__(self, api):
        self._api = api
        self._num_rows = 0

    async def __call__(self, scope, receive, send):
        self._num_rows += scope.get("method") == "POST"
        is_page = (scope.get("method"), self._num_rows) == ("POST", 1)
        await (PlainTextResponse("Please log in") if is_page else self._api)(scope, receive, send)


def test_an_answer_without_an_output_is_a_failure_and_may_be_retried(tokenizer, tmp_path):
    pytest.importorskip("pyarrow", reason="the data extra is not installed")
    source = tmp_path / "in.csv"
    source.write_text("text\nhello\n")
    output = tmp_path / "out.csv"
    with http_service(tokenizer, wrap=PageGateway) as url:
        asked = ["--url", url, "--input", str(source), "--output", str(output)]
        asked += ["--prompt-column", "text"]
        assert main(asked) == 2
        (record,) = read_lines(tmp_path / "out.errors.jsonl")
        assert record["error"]["message"] == "status 200, and no JSON"
        assert main([*asked, "--retry-errors"]) == 0
    assert "Hello" in output.read_text()


def test_a_service_that_is_full_is_asked_again(tokenizer, tmp_path):
    lines = [make_line(name, model=LocalService.model_name) for name in "abcd"]
    source = write_lines(tmp_path / "in.jsonl", lines)
    output = tmp_path / "out.jsonl"
    # One sequence fits, and one may wait.
    with http_service(tokenizer, num_blocks=3, queue=QueueLimits(max_requests=1)) as url:
        body = {**lines[0]["body"], "n": 3}  # what four rows at once would meet
        assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 429
        assert main(["--url", url, "--input", str(source), "--output", str(output)]) == 0
    assert [record["custom_id"] for record in read_lines(output)] == list("abcd")


def test_a_service_that_stays_full_ends_the_job_and_no_row_fails_for_it(
    tokenizer, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("gllm_ray.batch.answers._FIRST_DELAY_S", 0.01)
    monkeypatch.setattr("gllm_ray.batch.answers._MAX_DELAY_S", 0.02)
    monkeypatch.setattr("gllm_ray.batch.answers._retry_after_s", lambda _: 0.0)
    line = make_line("a", model=LocalService.model_name)
    source = write_lines(tmp_path / "in.jsonl", [line])
    output = tmp_path / "out.jsonl"
    with http_service(tokenizer, queue=QueueLimits(max_requests=0)) as url:
        assert main(["--url", url, "--input", str(source), "--output", str(output)]) == 1
    assert "it answers with status 429 again and again" in capsys.readouterr().err
    with http_service(tokenizer) as url:
        assert main(["--url", url, "--input", str(source), "--output", str(output)]) == 0
    assert [record["custom_id"] for record in read_lines(output)] == ["a"]


class Sleeper:
    """Stands before the routes, and lets no row through."""

    def __init__(self, api):
        self._api = api

    async def __call__(self, scope, receive, send):
        if scope.get("method") == "POST":
            while (await receive())["type"] != "http.disconnect":
                pass
        else:
            await self._api(scope, receive, send)


def test_a_service_that_takes_too_long_ends_the_job_and_names_the_limit(
    tokenizer, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("gllm_ray.batch.answers._FIRST_DELAY_S", 0.01)
    monkeypatch.setattr("gllm_ray.batch.answers._MAX_DELAY_S", 0.01)
    source = write_lines(tmp_path / "in.jsonl", [make_line("a", model=LocalService.model_name)])
    output = tmp_path / "out.jsonl"
    with http_service(tokenizer, wrap=Sleeper) as url:
        asked = ["--url", url, "--input", str(source), "--output", str(output)]
        assert main([*asked, "--timeout-s", "1"]) == 1
    assert f"{url} took longer than 1 s (--timeout-s) for a row" in capsys.readouterr().err


def test_a_service_with_keys_gets_the_one_of_the_environment(
    tokenizer, tmp_path, capfd, monkeypatch
):
    lines = [make_line(name, model=LocalService.model_name) for name in "abc"]
    source = write_lines(tmp_path / "in.jsonl", lines)
    output = tmp_path / "out.jsonl"
    keys = {"sk-right"}
    with http_service(tokenizer, keys=keys) as url:
        asked = ["--url", url, "--input", str(source), "--output", str(output)]
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        assert main(asked) == 1
        assert "wants an API key; --api-key-env names" in capfd.readouterr().err
        assert main([*asked, "--api-key-env", "OUR_KEY"]) == 1
        assert "--api-key-env=OUR_KEY: there is no such variable" in capfd.readouterr().err
        monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
        assert main(asked) == 1
        assert "refuses the API key" in capfd.readouterr().err
        monkeypatch.setenv("OPENAI_API_KEY", "sk-\nright")
        assert main(asked) == 1
        monkeypatch.setenv("OUR_KEY", "sk-right\n")  # as a Secret made from a file has it
        assert main([*asked, "--api-key-env", "OUR_KEY"]) == 0
        assert [record["custom_id"] for record in read_lines(output)] == list("abc")
        told = "".join(capfd.readouterr())
    written = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "right" not in told + written


def test_a_key_that_is_withdrawn_ends_the_job_and_fails_no_row(
    tokenizer, tmp_path, capsys, monkeypatch
):
    class Withdrawn(set):
        """Takes a key twice: for the card of the model, and for a row."""

        num_shown = 0

        def __contains__(self, key):
            self.num_shown += 1
            return self.num_shown <= 2 and super().__contains__(key)

    lines = [make_line(name, model=LocalService.model_name) for name in "abc"]
    source = write_lines(tmp_path / "in.jsonl", lines)
    output = tmp_path / "out.jsonl"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-right")
    keys = Withdrawn({"sk-right"})
    with http_service(tokenizer, keys=keys) as url:
        asked = ["--url", url, "--input", str(source), "--output", str(output)]
        assert main([*asked, "--max-in-flight", "1"]) == 1
        assert "does not take the API key any more" in capsys.readouterr().err
        assert [record["custom_id"] for record in read_lines(tmp_path / "out.jsonl.part")] == ["a"]
        keys.num_shown = -5
        assert main(asked) == 0
    assert [record["custom_id"] for record in read_lines(output)] == list("abc")


def stop_in_the_middle(command, journal, log):
    """Send SIGTERM when some rows are done; the exit status."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=file
        )
    deadline = time.monotonic() + 200
    while not journal.exists() or not journal.stat().st_size:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    return process.wait(60)


def check_stop(program, tmp_path):
    lines = [make_line(f"row {i}", max_tokens=100, ignore_eos=True) for i in range(200)]
    source = write_lines(tmp_path / "in.jsonl", lines)
    output, journal, log = (tmp_path / name for name in ("out.jsonl", "out.jsonl.part", "log"))
    command = [sys.executable, "-m", *program(source, output)]
    assert stop_in_the_middle(command, journal, log) == 128 + signal.SIGTERM
    assert "run it again to go on from here" in log.read_text()
    assert journal.read_bytes().endswith(b"\n")
    assert 0 < len(read_lines(journal)) < 200
    assert not output.exists()


def test_sigterm_keeps_what_is_done_and_ends_with_143(tmp_path):
    check_stop(lambda source, output: ["tests.batch.local_job", str(source), str(output)], tmp_path)


def test_sigterm_while_ray_connects_ends_with_143_too(tmp_path, capsys):
    async def job():
        # As Ray does until it is connected.
        before = signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(number))
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.signal(signal.SIGTERM, before)

    assert run_to_status(job(), str(tmp_path / "out.jsonl")) == 128 + signal.SIGTERM
    assert "run it again to go on from here" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_sigterm_ends_a_job_with_a_ray_of_its_own(config, tmp_path):
    def program(source, output):
        return ["gllm_ray.batch", *options(config, source, output, "--max-in-flight", "4")]

    check_stop(program, tmp_path)
