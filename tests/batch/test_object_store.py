"""Jobs whose files lie on an object store.

`GLLM_RAY_TEST_S3`, the address of an S3 service of yours, is used instead of the tests' own; then
the keys are taken from where AWS's clients look for them, and a bucket is made and left there.
That of Google Cloud Storage is an emulator, where anybody may read and write.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from gllm_ray.batch.command import main
from gllm_ray.batch.locations import open_remote
from tests.batch.gcs_server import gcs_server
from tests.batch.local_job import make_line, run_job, write_lines
from tests.batch.s3_server import s3_server
from tests.batch.test_command import http_service
from tests.fakes import LocalService

ROOT = Path(__file__).parents[2]


OWN_KEYS = ("nobody", "nothing")


@pytest.fixture(scope="module")
def s3():
    """The URI of a bucket that is empty."""
    fs = pytest.importorskip("pyarrow.fs", reason="the data extra is not installed")
    with pytest.MonkeyPatch.context() as environment, s3_server(OWN_KEYS) as own:
        if (given := os.environ.get("GLLM_RAY_TEST_S3")) is None:
            environment.setenv("AWS_ACCESS_KEY_ID", OWN_KEYS[0])
            environment.setenv("AWS_SECRET_ACCESS_KEY", OWN_KEYS[1])
        environment.setenv("AWS_ENDPOINT_URL", given or own)
        bucket = f"gllm-ray-{uuid.uuid4().hex[:8]}"
        maker, path = fs.FileSystem.from_uri(f"s3://{bucket}?allow_bucket_creation=true")
        maker.create_dir(path)
        yield f"s3://{bucket}"


@pytest.fixture(scope="module")
def gs():
    """The URI of a bucket that is empty."""
    pytest.importorskip("pyarrow.fs", reason="the data extra is not installed")
    with pytest.MonkeyPatch.context() as environment, gcs_server("gllm-ray") as address:
        environment.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", address)
        yield "gs://anonymous@gllm-ray"


@pytest.fixture(params=["s3", "gs"])
def bucket(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["memory", "s3", "gs"])
def folder(request):
    root = "memory:/" if request.param == "memory" else request.getfixturevalue(request.param)
    return f"{root}/{uuid.uuid4().hex}"


def read(uri):
    store, path = open_remote(uri)
    return store.cat_file(path)


def write(uri, content):
    store, path = open_remote(uri)
    store.pipe_file(path, content)


def segments_of(output):
    store, path = open_remote(f"{output}.part")
    return sorted(store.ls(path, detail=False)) if store.exists(path) else []


def custom_ids(content):
    return [json.loads(line)["custom_id"] for line in content.splitlines()]


def test_a_job_goes_on_from_its_segments(folder, tmp_path, tokenizer):
    source = write_lines(tmp_path / "in.jsonl", [make_line(name) for name in "abc"])
    output = f"{folder}/out.jsonl"
    store, path = open_remote(output)
    asyncio.run(run_job(source, output, tokenizer))
    (segment,) = segments_of(output)
    records = store.cat_file(segment).splitlines(keepends=True)
    kept = {json.loads(record)["id"] for record in records[:2]}
    store.pipe_file(segment, b"".join(records[:2]))  # as a job leaves it that dies now
    store.rm_file(path)
    result = asyncio.run(run_job(source, output, tokenizer))
    assert (result.num_rows, result.num_failed) == (3, 0)
    assert custom_ids(read(output)) == list("abc")
    assert kept < {json.loads(record)["id"] for record in read(output).splitlines()}
    assert len(segments_of(output)) == 2
    assert read(f"{folder}/out.errors.jsonl") == b""


def test_the_command_takes_its_input_from_a_bucket_and_leaves_all_there(bucket, tokenizer, capsys):
    rows = [make_line(name, model=LocalService.model_name) for name in "ab"]
    rows.append(make_line("long", model=LocalService.model_name, max_tokens=500))
    source, output = f"{bucket}/a%20folder/in.jsonl", f"{bucket}/another/out.jsonl"
    write(source, "\n".join(map(json.dumps, rows)).encode())
    with http_service(tokenizer) as url:

        def run(source, output):
            return main(["--url", url, "--input", source, "--output", output])

        assert run(source, output) == 2
        assert (
            f"2 of 3 rows in {output}, 1 in {bucket}/another/out.errors" in capsys.readouterr().out
        )
        answers = read(output)
        assert custom_ids(answers) == list("ab")
        assert custom_ids(read(f"{bucket}/another/out.errors.jsonl")) == ["long"]
        assert json.loads(read(f"{output}.manifest.json"))["is_complete"]

        assert run(source, output) == 2  # done already, so nothing runs
        assert read(output) == answers
        write(source, json.dumps(rows[0]).encode())
        assert run(source, output) == 1
        assert "input_sha256 changed" in capsys.readouterr().err
        assert run(f"{bucket}/none.jsonl", output) == 1
        assert f"{bucket}/none.jsonl: there is no such file" in capsys.readouterr().err
        assert run(source, bucket.replace("gllm-ray", "no-such-bucket") + "/out.jsonl") == 1
        assert "no-such-bucket" in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
@pytest.mark.parametrize("is_input", [True, False])
def test_the_command_ends_with_one_error_if_the_keys_are_wrong(
    s3, tokenizer, tmp_path, monkeypatch, capsys, variable, is_input
):
    rows = [make_line("a", model=LocalService.model_name)]
    local = str(write_lines(tmp_path / "in.jsonl", rows))
    remote = f"{s3}/refused/{'in' if is_input else 'out'}.jsonl"
    write(f"{s3}/refused/in.jsonl", Path(local).read_bytes())
    monkeypatch.setenv(variable, "wrong")
    source, output = (remote, str(tmp_path / "out.jsonl")) if is_input else (local, remote)
    with http_service(tokenizer) as url:
        assert main(["--url", url, "--input", source, "--output", output]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert remote in error
    assert "ACCESS_DENIED" in error


@pytest.mark.parametrize("is_input", [True, False])
def test_the_command_ends_with_one_error_without_the_credentials_of_google(
    tokenizer, tmp_path, monkeypatch, capsys, is_input
):
    pytest.importorskip("pyarrow.fs", reason="the data extra is not installed")
    rows = [make_line("a", model=LocalService.model_name)]
    local = str(write_lines(tmp_path / "in.jsonl", rows))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    remote = "gs://gllm-ray/refused.jsonl"
    source, output = (remote, str(tmp_path / "out.jsonl")) if is_input else (local, remote)
    with http_service(tokenizer) as url:
        assert main(["--url", url, "--input", source, "--output", output]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"{remote}: ")
    assert "none.json" in error


# A job as a program that saves its journal every quarter of a second.
PROGRAM = """
import runpy
from gllm_ray.batch import workspace
workspace._SAVE_INTERVAL_S = 0.25
runpy.run_module("tests.batch.local_job", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_job_killed_twice_goes_on_from_its_segments_in_a_bucket(bucket, tmp_path):
    names = [f"row {i}" for i in range(60)]
    lines = [make_line(name, max_tokens=30, ignore_eos=True) for name in names]
    source = write_lines(tmp_path / "in.jsonl", lines)
    output = f"{bucket}/killed/out.jsonl"
    store, _ = open_remote(output)
    command = [sys.executable, "-c", PROGRAM, str(source), output]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    log = tmp_path / "log"
    with log.open("w") as file:
        for num_kills in range(2):
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=file)
            deadline = time.monotonic() + 80
            while len(segments_of(output)) == num_kills:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.kill()
            process.wait()
        saved = [line for name in segments_of(output) for line in store.cat_file(name).splitlines()]
        assert 0 < len(saved) < len(names)
        done = subprocess.run(command, cwd=ROOT, env=environment, stderr=file, check=False)
    assert done.returncode == 0, log.read_text()
    assert custom_ids(read(output)) == names
    assert set(saved) < set(read(output).splitlines())
