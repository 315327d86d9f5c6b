"""What deploy/ hands to Ray, for real: on two nodes of this machine, with a token."""

import json
import re
import shlex
import time
import urllib.request

import openai
import pytest

from gllm_ray.serving.observability import METRIC_PREFIX, METRICS
from gllm_ray.strict_yaml import read_documents
from tests.batch.local_job import make_line
from tests.batch.s3_server import s3_server
from tests.deploy.local_cluster import LocalCluster, skip_unless_the_port_is_free
from tests.deploy.manifests import DEPLOY, ROOT

# Counted when they first happen.
RARE = {"num_preemptions_total", "request_resumptions_total"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster():
    skip_unless_the_port_is_free()
    with LocalCluster(worker_cpus=[2]) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def service(cluster):
    return cluster.deploy_overlay("dev-cpu")


def _job_entrypoint(kind, here):
    """The words of a manifest's, with what this machine lacks replaced."""
    (job,) = read_documents(DEPLOY / "rayjob" / kind / "rayjob.yaml")
    command = job["spec"]["entrypoint"]
    for old, new in here.items():
        assert command.count(old) == 1
        command = command.replace(old, new)
    return shlex.split(command)


def test_nobody_without_the_token_gets_at_the_cluster(cluster):
    assert cluster.status_of("/api/serve/applications/") == 200
    assert cluster.status_of("/api/serve/applications/", token=False) == 401
    assert cluster.status_of("/api/jobs/", token=False) == 401


def test_the_entrypoint_of_the_batch_runs_as_a_job_from_s3_to_s3(cluster):
    fs = pytest.importorskip("pyarrow.fs", reason="the data extra is not installed")
    lines = [make_line(name) for name in "abc"]
    # The image's configuration is for a GPU; its buckets are as the manifest has them.
    model = {"/opt/gllm_ray/configs/llama8b-1gpu.yaml": str(ROOT / "configs" / "demo.yaml")}
    key, secret = "nobody", "nothing"
    with s3_server((key, secret)) as url:
        variables = {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
        }
        store = fs.S3FileSystem(
            endpoint_override=url, access_key=key, secret_key=secret, allow_bucket_creation=True
        )
        store.create_dir("example-bucket")
        with store.open_output_stream("example-bucket/prompts.jsonl") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        result = cluster.run(
            *("ray", "job", "submit", "--address", cluster.dashboard),
            *("--runtime-env-json", json.dumps({"env_vars": variables}), "--"),
            *_job_entrypoint("batch", model),
        )
        assert result.returncode == 0, result.stdout + result.stderr
        assert "3 of 3 rows in s3://example-bucket/answers.jsonl" in result.stdout
        answers = store.open_input_stream("example-bucket/answers.jsonl").read().splitlines()
    assert [json.loads(answer)["custom_id"] for answer in answers] == list("abc")


def test_the_text_in_serve_config_v2_is_served(service):
    with openai.OpenAI(base_url=f"{service}/v1", api_key="none", max_retries=0) as client:
        answers = [
            client.completions.create(
                model="gllm-ray-demo",
                prompt="def area(" * 12,
                max_tokens=16,
                temperature=0,
                extra_body={"ignore_eos": True},
            )
            for _ in range(2)
        ]
    assert answers[0].choices[0].text == answers[1].choices[0].text
    assert answers[0].usage.completion_tokens == 16
    with urllib.request.urlopen(f"{service}/server_info", timeout=10) as response:
        assert len(json.load(response)["stages"]) == 2


def test_the_entrypoint_of_the_benchmark_runs_as_a_job(service, cluster):
    entrypoint = _job_entrypoint("bench", {"http://gllm-ray-serve-svc:8000": service})
    result = cluster.run("ray", "job", "submit", "--address", cluster.dashboard, "--", *entrypoint)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "succeeded" in result.stdout
    assert re.search(r"^\| serve \| .* \| 64, 8/s", result.stdout, re.MULTILINE), result.stdout


def test_prometheus_gets_every_metric_of_the_service(service, cluster):
    deadline_s = time.monotonic() + 60
    wanted = {f"ray_{METRIC_PREFIX}{name}" for name in METRICS if name not in RARE}
    while missing := wanted - _families(cluster.metrics()):
        assert time.monotonic() < deadline_s, missing
        time.sleep(2)


def _families(text):
    """The names of metrics, without the suffixes of a histogram's series."""
    names = {line.partition("{")[0] for line in text.splitlines() if not line.startswith("#")}
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}
